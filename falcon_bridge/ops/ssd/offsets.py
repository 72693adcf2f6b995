"""How long a row the scan's kernels can address.

Our own have 64-bit offsets. mamba-ssm's have the offset of a chunk's first element in int32: program ids and strides
are int32, and ``pid_b · stride_batch + pid_c · chunk_size · stride_seqlen + pid_h · stride_head`` is summed up before
it is added to the pointer (`ssd_chunk_state.py`, `ssd_chunk_scan.py`, `ssd_combined.py`, `ssd_bmm.py` and the backward
half of `ssd_state_passing.py`; state-spaces/mamba issue 1015). Beyond 2^31 elements it wraps, and the kernel reads and
writes before the tensor, mostly without an error. Steps within a chunk advance pointers, which are 64 bits wide. A
view counts with its strides: what matters is how far apart its first and last elements lie, not how many it has.

causal-conv1d, which runs before either, multiplies token and stride in uint32, so it has twice that reach; but what it
reads and writes are views into in_proj's output and its gradient, whose rows are wider. It and mamba-ssm launch a
program for every chunk of a row on the grid's second axis, of which CUDA allows 65,535: those launches fail with an
error.
"""

from typing import Protocol


ADDRESSABLE = {"mamba_ssm": 2**31, "triton": 2**32}
"""Elements that the offsets of a backend, or of the convolution before it, reach."""
_TILE = 256
"""Tokens that one tile of ours takes at most; within it, offsets are int32."""


class ScanWidths(Protocol):
    """Widths of a scan on one rank; `ops.ssm_scan.SSMShape` is one."""

    heads: int
    head_dim: int
    groups: int
    d_state: int
    chunk_size: int
    backend: str


def scan_spans(rows: int, length: int, widths: ScanWidths) -> dict[str, int]:
    """Elements between the first and the last of each kind of tensor that the kernels index, strides included.

    Args:
        rows: of the micro batch.
        length: tokens of a row.
        widths: of the scan on this rank.
    """
    tokens, chunks = rows * length, rows * -(-length // widths.chunk_size)
    inner, bc = widths.heads * widths.head_dim, 2 * widths.groups * widths.d_state
    if widths.backend == "triton":
        return {"in_proj's output": tokens * (2 * inner + bc + widths.heads)}
    return {
        # x, B and C are views of it, and so are their gradients; twice its width, uint32 reaches over in_proj's output
        "the convolution's output": tokens * (inner + bc),
        "the states of the chunks": chunks * inner * widths.d_state,
        # C·B [b, s/chunk, groups, chunk, chunk]
        "the products of C and B": chunks * widths.groups * widths.chunk_size**2,
        # _chunk_scan_bwd_ddAcs_stable: [b, heads, s/chunk, chunk/32, chunk]
        "the gradients of the decays": chunks * widths.heads * -(-widths.chunk_size // 32) * widths.chunk_size,
    }


def check_scan_offsets(rows: int, length: int, widths: ScanWidths) -> None:
    """Refuse what the kernels would address wrongly.

    Args:
        rows: of the micro batch.
        length: tokens of a row.
        widths: of the scan on this rank.

    Raises:
        ValueError: If a tensor spans more elements than `ADDRESSABLE` says.
    """
    width = max(scan_spans(rows, 1, widths).values())
    if widths.backend == "triton" and width * _TILE >= 2**31:
        raise ValueError(
            f"{rows} rows are too many for the scan's kernels: tokens of a row lie {width:,} elements apart, of which "
            f"they can address {2**31 // _TILE:,}. Use a smaller micro batch"
        )
    name, span = max(scan_spans(rows, length, widths).items(), key=lambda item: item[1])
    reach = ADDRESSABLE[widths.backend]
    if span > reach:
        whose = {"mamba_ssm": "mamba-ssm", "triton": "causal-conv1d"}[widths.backend]
        raise ValueError(
            f"{rows} rows of {length} tokens are too long for {whose}'s kernels: {name} spans {span:,} elements on a "
            f"rank, of which they can address {reach:,}. Use a larger context or tensor parallel size, or fewer or "
            "shorter rows"
        )
