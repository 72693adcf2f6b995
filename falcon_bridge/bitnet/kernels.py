"""Triton kernels of BitNet b1.58: one pass to quantise, and an int8 GEMM whose epilogue applies the scales.

Each has its oracle in `reference.py` and gives the same codes bit for bit. For that, contraction into fused
multiply-adds is off where a product is rounded before half is added, and divisions are IEEE's.
"""

import triton
import triton.language as tl


MAX_BLOCK_K = 16384
"""Features of a token that one program holds in registers; longer rows are read twice."""


@triton.jit
def _to_code(scaled, scale, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Round half up and clamp; 0 where the scale is NaN, which then shows in the scale."""
    code = tl.minimum(tl.maximum(tl.floor(scaled + 0.5), LOWEST), HIGHEST)
    return tl.where(scale == scale, code, 0.0).to(tl.int8)


@triton.jit
def _finite_abs(x):
    """|x| as fp32 with +inf for NaN, which a maximum would otherwise drop."""
    magnitude = tl.abs(x.to(tl.float32))
    return tl.where(magnitude < float("inf"), magnitude, float("inf"))


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    absmax_ptr,
    codes_ptr,
    scale_ptr,
    K,
    stride_x,
    HAS_ABSMAX: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    """One token a program: absmax, scale and int8 codes.

    x `[m, k]` with unit stride over k; absmax fp32 `[m]`, the maximum over whole rows that x holds parts of; codes
    int8 `[m, k]` contiguous; scale fp32 `[m]`. With WHOLE_ROW, BLOCK_K ≥ k and x is read once.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_x
    codes_row = codes_ptr + row * K
    offsets = tl.arange(0, BLOCK_K)
    if WHOLE_ROW:
        x = tl.load(x_row + offsets, mask=offsets < K, other=0.0).to(tl.float32)
        absmax = tl.max(_finite_abs(x), axis=0)
    else:
        largest = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            block = tl.load(x_row + start + offsets, mask=start + offsets < K, other=0.0)
            largest = tl.maximum(largest, _finite_abs(block))
        absmax = tl.max(largest, axis=0)
    finite = absmax < float("inf")
    if HAS_ABSMAX:
        absmax = tl.load(absmax_ptr + row)
        finite = finite & (absmax < float("inf"))
    # PyTorch divides a number by a tensor in these two roundings
    scale = tl.where(finite, tl.div_rn(1.0, tl.maximum(absmax, 1e-5)) * 127.0, float("nan"))
    tl.store(scale_ptr + row, scale)
    if WHOLE_ROW:
        tl.store(codes_row + offsets, _to_code(x * scale, scale, -128.0, 127.0), mask=offsets < K)
    else:
        for start in range(0, K, BLOCK_K):
            block = tl.load(x_row + start + offsets, mask=start + offsets < K, other=0.0).to(tl.float32)
            code = _to_code(block * scale, scale, -128.0, 127.0)
            tl.store(codes_row + start + offsets, code, mask=start + offsets < K)


@triton.jit
def abs_row_sums_kernel(w_ptr, sums_ptr, K, stride_w, BLOCK_K: tl.constexpr):
    """Sums of |w| over the rows of a weight `[n, k]` with unit stride over k: one row a program, fp64 `[n]`."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, K, BLOCK_K):
        w = tl.load(w_ptr + row * stride_w + start + offsets, mask=start + offsets < K, other=0.0)
        total += tl.abs(w.to(tl.float64))
    tl.store(sums_ptr + row, tl.sum(total, axis=0))


@triton.jit
def abs_partial_sums_kernel(
    w_ptr,
    row_segments_ptr,
    sums_ptr,
    N,
    K,
    stride_w,
    rows_per_program,
    HAS_SEGMENTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of |w| over a range of rows for each matrix that they belong to, fp64 `[programs, SEGMENTS]`.

    w `[n, k]` with unit stride over k; row_segments int64 `[n]`, or None for one matrix; SEGMENTS a power of two.
    Without atomics: the same sums in every run.
    """
    program = tl.program_id(0)
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, N)
    segments = tl.arange(0, SEGMENTS)
    totals = tl.zeros([SEGMENTS], tl.float64)
    for start_n in range(first, end, BLOCK_N):
        rows = start_n + tl.arange(0, BLOCK_N)
        w_rows = w_ptr + rows.to(tl.int64)[:, None] * stride_w
        row_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
        for start_k in range(0, K, BLOCK_K):
            columns = start_k + tl.arange(0, BLOCK_K)
            w = tl.load(w_rows + columns[None, :], mask=(rows < end)[:, None] & (columns < K)[None, :], other=0.0)
            row_sums += tl.abs(w.to(tl.float64))
        row_sum = tl.sum(row_sums, axis=1)
        if HAS_SEGMENTS:
            segment = tl.load(row_segments_ptr + rows, mask=rows < end, other=0)
            # a choice, not a product with the mask: NaN · 0 would carry one matrix's NaN into the others
            row_sum = tl.where(segment[:, None] == segments[None, :], row_sum[:, None], 0.0)
            totals += tl.sum(row_sum, axis=0)
        else:
            totals += tl.sum(row_sum, axis=0)
    tl.store(sums_ptr + program * SEGMENTS + segments, totals)


@triton.jit
def _ternary(w, scale):
    return _to_code(w.to(tl.float32) * scale, scale, -1.0, 1.0)


@triton.jit
def quantize_weight_kernel(
    w_ptr,
    row_scales_ptr,
    codes_ptr,
    N,
    K,
    stride_w,
    stride_scales,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Ternary codes of a weight `[n, k]` with unit stride over k, by its rows' scales (stride 0: one for all)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    rows = rows.to(tl.int64)
    scale = tl.load(row_scales_ptr + rows * stride_scales, mask=rows < N, other=1.0)[:, None]
    w = tl.load(w_ptr + rows[:, None] * stride_w + columns[None, :], mask=mask, other=0.0)
    tl.store(codes_ptr + rows[:, None] * K + columns[None, :], _ternary(w, scale), mask=mask)


@triton.jit
def quantize_weight_by_sums_kernel(
    w_ptr,
    sums_ptr,
    counts_ptr,
    row_segments_ptr,
    row_scales_ptr,
    codes_ptr,
    N,
    K,
    stride_w,
    P,
    S,
    HAS_SEGMENTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_N: tl.constexpr,
):
    """Scales ``1 / max(mean|w|, 1e-5)`` of the matrices of a weight from partial sums, and its ternary codes by them.

    w, row_segments, SEGMENTS as in `abs_partial_sums_kernel`; sums fp64 `[P, SEGMENTS]`, P at most BLOCK_P; counts
    fp64 `[S]`, elements of each matrix. Every program adds the sums up anew, which costs less than a launch that does
    it once. row_scales fp32 `[n]`, or `[1]` without row_segments. TILES_N tiles of rows a program.
    """
    segments = tl.arange(0, SEGMENTS)
    parts = tl.arange(0, BLOCK_P)
    sums = tl.load(sums_ptr + parts[:, None] * SEGMENTS + segments[None, :], mask=(parts < P)[:, None], other=0.0)
    counts = tl.load(counts_ptr + segments, mask=segments < S, other=1.0)
    mean = (tl.sum(sums, axis=0) / counts).to(tl.float32)
    scales = tl.where(mean < float("inf"), tl.div_rn(1.0, tl.maximum(mean, 1e-5)), float("nan"))
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(0) * (TILES_N * BLOCK_N)
    for tile in range(TILES_N):
        rows = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = rows < N
        mask = inside[:, None] & (columns < K)[None, :]
        wide_rows = rows.to(tl.int64)
        w = tl.load(w_ptr + wide_rows[:, None] * stride_w + columns[None, :], mask=mask, other=0.0)
        if HAS_SEGMENTS:
            segment = tl.load(row_segments_ptr + rows, mask=inside, other=0)
            scale = tl.sum(tl.where(segment[:, None] == segments[None, :], scales[None, :], 0.0), axis=1)
            if tl.program_id(1) == 0:
                tl.store(row_scales_ptr + rows, scale, mask=inside)
        else:
            scale = tl.sum(scales, axis=0) + tl.zeros([BLOCK_N], tl.float32)
            if tl.program_id(1) == 0:
                tl.store(row_scales_ptr + rows, scale, mask=rows == 0)
        tl.store(codes_ptr + wide_rows[:, None] * K + columns[None, :], _ternary(w, scale[:, None]), mask=mask)


@triton.jit
def dequantize_rows_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,
    N,
    K,
    stride_codes,
    stride_scales,
    IEEE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``codes / scale`` for int8 codes `[n, k]` with a scale a row (stride 0: one for all), in out's dtype.

    Without IEEE, the rows' reciprocals multiply: a unit in fp32's last place, which rounding to bf16 mostly hides.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    rows = rows.to(tl.int64)
    scale = tl.load(scales_ptr + rows * stride_scales, mask=rows < N, other=1.0)[:, None]
    codes = tl.load(codes_ptr + rows[:, None] * stride_codes + columns[None, :], mask=mask, other=0)
    if IEEE:
        value = tl.div_rn(codes.to(tl.float32), tl.broadcast_to(scale, (BLOCK_N, BLOCK_K)))
    else:
        value = codes.to(tl.float32) * (1.0 / scale)
    tl.store(out_ptr + rows[:, None] * K + columns[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rescale(product, scale):
    """``product / scale``: the quotient of an approximate reciprocal, corrected once, rounds as IEEE's does.

    Half the instructions of a division, which the epilogue of a short GEMM feels.
    """
    reciprocal = 1.0 / scale
    quotient = product * reciprocal
    return tl.fma(tl.fma(-quotient, scale, product), reciprocal, quotient)


@triton.jit
def scaled_int8_gemm_kernel(
    q_desc,
    w_desc,
    y_ptr,
    scale_ptr,
    row_scales_ptr,
    M,
    N,
    K,
    stride_scales,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IEEE: tl.constexpr,
):
    """``y = (q @ wᵀ) / (a · s)``: exact int32 products of int8 codes, scaled in fp32, rounded once.

    q int8 `[m, k]` and w int8 `[n, k]` as tensor descriptors with blocks (BLOCK_M, BLOCK_K) and (BLOCK_N, BLOCK_K);
    y `[m, n]` contiguous; scale a fp32 `[m]`; row_scales s fp32 `[n]` (stride 0: one for all).
    """
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # neighbours in time share tiles of both operands in L2
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    start_m = (first_m + (program % (GROUP_M * tiles_n)) % group_m) * BLOCK_M
    start_n = ((program % (GROUP_M * tiles_n)) // group_m) * BLOCK_N
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start_k in range(0, K, BLOCK_K):
        q = q_desc.load([start_m, start_k])
        w = w_desc.load([start_n, start_k])
        product = tl.dot(q, w.T, product, out_dtype=tl.int32)
    rows = start_m + tl.arange(0, BLOCK_M)
    columns = start_n + tl.arange(0, BLOCK_N)
    a = tl.load(scale_ptr + rows, mask=rows < M, other=1.0)[:, None]
    s = tl.load(row_scales_ptr + columns * stride_scales, mask=columns < N, other=1.0)[None, :]
    if IEEE:
        y = tl.div_rn(product.to(tl.float32), a * s)
    else:
        y = _rescale(product.to(tl.float32), a * s)
    out = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
