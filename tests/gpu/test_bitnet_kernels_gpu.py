"""The fused backend against the oracle on GPU: codes and scales bit for bit, products exact before rounding."""

import pytest
import torch

from falcon_bridge.bitnet import reference


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SHAPES = [
    (1, 16, 4),
    (3, 33, 7),
    (64, 128, 128),
    (130, 100, 129),
    (257, 1000, 513),
    (512, 4608, 1031),
    (70_000, 64, 48),  # more rows than a grid's second dimension holds
    (8, 20_000, 32),  # longer than a program's registers hold
    (4, 131_072 + 64, 16),  # sums beyond 2^24
]


@pytest.fixture(scope="module")
def backend():
    from falcon_bridge.bitnet.fused import FusedBackend

    return FusedBackend()


def _matrices(m: int, k: int, n: int, dtype: torch.dtype):
    torch.manual_seed(m + k + n)
    x = torch.randn(m, k, device="cuda") * torch.rand(m, 1, device="cuda") * 3
    W = torch.randn(n, k, device="cuda") * torch.rand(n, 1, device="cuda")
    W[-1] = 0
    x[-1] = 0
    return x.to(dtype), W.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_scales_and_products_are_the_oracles(backend, shape, dtype):
    m, k, n = shape
    x, W = _matrices(m, k, n, dtype)
    segments = torch.arange(n, device="cuda") % 2
    num_segments = min(2, n)
    weight_codes, scales = reference.quantize_weight_segmented(W, segments, num_segments)
    row_scales = scales[segments]

    codes, scale = backend.quantize_activation(x)
    expected_codes, expected_scale = reference.quantize_activation(x)

    assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)
    assert torch.equal(backend.quantize_weight(W, row_scales), weight_codes)
    torch.testing.assert_close(backend.abs_row_sums(W), W.double().abs().sum(1), rtol=1e-14, atol=0)
    integers = codes.double() @ weight_codes.double().T  # exact: |sum| < 2^53
    expected = (integers.float() / (scale * row_scales)).to(dtype)
    assert torch.equal(backend.forward(codes, scale, weight_codes, row_scales, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_gradients_are_the_oracles_within_rounding(backend, shape, dtype):
    m, k, n = shape
    x, W = _matrices(m, k, n, dtype)
    codes, scale = reference.quantize_activation(x)
    weight_codes, scales = reference.quantize_weight_segmented(W, torch.arange(n, device="cuda") % 2, min(2, n))
    row_scales = scales[torch.arange(n, device="cuda") % 2]
    grad = torch.randn(m, n, device="cuda").to(dtype)
    expected_x = (grad.double() / row_scales) @ weight_codes.double()
    expected_weight = grad.double().T @ (codes.double() / scale)
    main_grad = torch.randn(n, k, device="cuda")
    expected_main = main_grad + expected_weight
    tolerance = 1e-3 if dtype == torch.float32 else 2**-7  # fp32 GEMMs may take TF32

    grad_x = backend.grad_input(grad, weight_codes, row_scales, dtype)
    grad_weight = backend.grad_weight(grad, codes, scale, dtype)

    assert backend.grad_weight(grad, codes, scale, dtype, main_grad) is None
    for actual, expected in ((grad_x, expected_x), (grad_weight, expected_weight), (main_grad, expected_main)):
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()
    assert grad_x.dtype == grad_weight.dtype == dtype and main_grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 16), (7, 33), (513, 1000), (2560, 2048), (9000, 264), (5, 70_000)], ids=str)
def test_a_weight_by_its_means_in_two_launches(backend, shape, segments, dtype):
    n, k = shape
    _, W = _matrices(1, k, n, dtype)
    rows = None if segments == 1 else (torch.arange(n, device="cuda") // 3) % segments
    expected, scales = reference.quantize_weight_segmented(W, rows, segments)
    of_row = torch.zeros(n, dtype=torch.int64) if rows is None else rows.cpu()
    counts = (of_row.bincount(minlength=segments).double() * k).cuda()
    strided = torch.cat([W[:, :1], W], dim=1)[:, 1:]
    for weight in (W, strided):
        codes, row_scales = backend.quantize_weight_by_mean(weight, counts, rows)
        # the sums are added up in another order: 1e-9 of the spacing of fp32
        assert torch.equal(row_scales, scales if rows is None else scales[rows])
        assert torch.equal(codes, expected)


def test_bad_values_of_a_weight_stay_in_their_matrix(backend):
    _, W = _matrices(1, 300, 60, torch.bfloat16)
    rows = torch.arange(60, device="cuda") // 20
    counts = torch.full((3,), 20 * 300.0, dtype=torch.float64, device="cuda")
    W[25, 7], W[41, 3] = float("nan"), float("-inf")
    codes, row_scales = backend.quantize_weight_by_mean(W, counts, rows)
    assert torch.equal(row_scales.isnan(), rows > 0) and not codes[rows > 0].any() and codes[rows == 0].any()


def _one_pass(backend, x, W, grad, counts=None):
    """All kernels of a layer, from latent weight to gradients."""
    counts = torch.tensor([float(W.numel())], dtype=torch.float64).cuda() if counts is None else counts
    weight_codes, row_scales = backend.quantize_weight_by_mean(W, counts)
    codes, scale = backend.quantize_activation(x)
    y = backend.forward(codes, scale, weight_codes, row_scales, x.dtype)
    dx = backend.grad_input(grad, weight_codes, row_scales, x.dtype)
    return y, dx, backend.grad_weight(grad, codes, scale, W.dtype)


def _expected_output(x, W):
    weight_codes, scale_w = reference.quantize_weight(W)
    codes, scale = reference.quantize_activation(x)
    integers = codes.double() @ weight_codes.double().T
    return (integers.float() / (scale * scale_w)).to(x.dtype)


def test_launches_of_alternating_shapes_and_alignments_keep_to_their_kernels(backend):
    """A kernel that was compiled for aligned pointers or even strides gives wrong results or faults for others."""
    cases = []
    for m, k, n in ((64, 256, 128), (65, 257, 129), (64, 256, 128), (1, 16, 1), (33, 272, 48), (16, 1, 16)):
        for dtype in (torch.bfloat16, torch.float32):
            x, W = _matrices(m, k, n, dtype)
            wide_x, wide_W = (torch.nn.functional.pad(tensor, (1, 0)) for tensor in (x, W))
            flat = torch.cat([W.new_zeros(1), W.flatten()])[1:].view(n, k)  # unit strides from a misaligned address
            grad = torch.randn(m, n, device="cuda").to(dtype)
            cases += [
                (x, W, grad),
                (wide_x[:, 1:], wide_W[:, 1:], grad),
                (x, flat, grad),
                (x.t().contiguous().t(), W, grad),
            ]
    expected = [(_expected_output(x, W), *_one_pass(backend, x, W, grad)[1:]) for x, W, grad in cases]
    for _ in range(3):
        for (x, W, grad), (y, dx, dW) in zip(cases, expected, strict=True):
            actual = _one_pass(backend, x, W, grad)
            assert torch.equal(actual[0], y)
            for one, other in zip(actual[1:], (dx, dW), strict=True):
                assert (one.float() - other.float()).norm() <= 1e-3 * other.float().norm()


def test_launches_go_to_the_current_stream(backend):
    """Each of two streams waits for its own input, which is late on one of them."""
    x, W = _matrices(512, 1024, 768, torch.bfloat16)
    late = torch.zeros_like(x)
    expected = [_expected_output(x, W), _expected_output(x * 2, W)]
    weight_codes, scale_w = reference.quantize_weight(W)
    row_scales = scale_w.view(1)

    def output(tokens):
        return backend.forward(*backend.quantize_activation(tokens), weight_codes, row_scales, tokens.dtype)

    output(x), output(late)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(50_000_000)
        late.copy_(x * 2)
        results.append(output(late))
    with torch.cuda.stream(streams[1]):
        results.append(output(x))
    streams[1].synchronize()
    assert not streams[0].query()  # so the second did not wait for the first
    assert torch.equal(results[1], expected[0])
    torch.cuda.synchronize()
    assert torch.equal(results[0], expected[1])


def test_a_captured_pass_computes_what_it_is_given_on_replay(backend):
    x, W = _matrices(300, 1024, 520, torch.bfloat16)
    grad = torch.randn(300, 520, device="cuda").bfloat16()
    counts = torch.tensor([float(W.numel())], dtype=torch.float64, device="cuda")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _one_pass(backend, x, W, grad, counts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = _one_pass(backend, x, W, grad, counts)
    for factor in (1.0, 3.0):
        x.mul_(factor), W.mul_(-factor), grad.mul_(factor)
        graph.replay()
        expected = _one_pass(backend, x, W, grad)
        assert torch.equal(captured[0], _expected_output(x, W))
        for one, other in zip(captured[1:], expected[1:], strict=True):
            assert (one.float() - other.float()).norm() <= 1e-3 * other.float().norm()


def test_tensors_of_the_host_are_refused(backend):
    on_device, on_host = torch.ones(4, 32, device="cuda"), torch.ones(4, 32)
    backend.quantize_activation(on_device)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        backend.quantize_activation(on_host)
    codes, _ = backend.quantize_activation(on_device)
    assert codes.eq(127).all()


def test_strided_input_and_given_absmax(backend):
    x = torch.randn(96, 300, device="cuda", dtype=torch.bfloat16)
    absmax = x.abs().amax(1, keepdim=True).float() * 1.5
    for view, whole in ((x[:, 100:200], absmax), (x.t(), None), (x[::3], absmax[::3])):
        codes, scale = backend.quantize_activation(view, whole)
        expected_codes, expected_scale = reference.quantize_activation(view, whole)
        assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_reaches_every_output_that_depends_on_it(backend, bad):
    x, W = _matrices(16, 256, 24, torch.bfloat16)
    x[3, 200] = bad
    weight_codes, scale_w = reference.quantize_weight(W)

    codes, scale = backend.quantize_activation(x)
    y = backend.forward(codes, scale, weight_codes, scale_w.view(1), torch.bfloat16)

    assert scale.isnan().flatten().tolist() == [row == 3 for row in range(16)]
    assert y[3].isnan().all() and not y[torch.arange(16) != 3].isnan().any()


def test_more_than_2_to_31_elements(backend):
    m, k = 70_000, 32_768  # 2.3e9
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16).expand(m, k).contiguous()
    x[-1] *= 2
    codes, scale = backend.quantize_activation(x)
    expected_codes, expected_scale = reference.quantize_activation(x[-1:])
    assert torch.equal(codes[-1:], expected_codes) and torch.equal(scale[-1:], expected_scale)
    del x
    weight_codes = torch.randint(-1, 2, (64, k), device="cuda", dtype=torch.int8)
    y = backend.forward(codes, scale, weight_codes, torch.ones(1, device="cuda"), torch.bfloat16)
    expected = reference.product_of_codes(codes[-1:], weight_codes) / scale[-1:]
    assert torch.equal(y[-1:], expected.bfloat16())
