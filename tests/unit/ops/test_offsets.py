"""How far the scan's kernels reach, against the tensors and views that `ssm_scan` hands them."""

import pytest
import torch

from falcon_bridge.ops.ssd.offsets import ADDRESSABLE, check_scan_offsets, scan_spans
from falcon_bridge.ops.ssm_scan import SSMShape


def widths(**fields) -> SSMShape:
    shape = {"heads": 24, "head_dim": 64, "groups": 1, "d_state": 128, "chunk_size": 128, "scales": (1.0,) * 5}
    return SSMShape(**{**shape, "backend": "mamba_ssm", **fields})


def span(view: torch.Tensor) -> int:
    """Elements from the first of a view to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fields", [{}, {"groups": 2, "d_state": 64}, {"heads": 5, "head_dim": 32, "chunk_size": 96}])
def test_views_span_no_more_than_is_said(rows, fields):
    length, shape = 1000, widths(**fields)
    said = scan_spans(rows, length, shape)
    conv = torch.empty(length, rows, shape.segments[1], device="meta").transpose(0, 1)
    bc = shape.groups * shape.d_state
    assert all(span(view) <= span(conv) == said["the convolution's output"] for view in conv.split(
        [shape.inner, bc, bc], dim=-1
    ))  # fmt: skip
    chunks = -(-length // shape.chunk_size)
    states = torch.empty(rows, chunks, shape.heads, shape.head_dim, shape.d_state, device="meta")
    assert span(states) == said["the states of the chunks"]


def test_the_widest_tensor_decides():
    # one more token than fits, of a tensor that is the widest in its case
    wide = widths()
    length = ADDRESSABLE["mamba_ssm"] // (1536 + 2 * 128)
    check_scan_offsets(1, length, wide)
    check_scan_offsets(2, length // 2, wide)
    for rows, tokens in ((1, length + 1), (2, length // 2 + 1)):
        with pytest.raises(ValueError, match=rf"{rows} rows of {tokens} tokens .* the convolution's output spans"):
            check_scan_offsets(rows, tokens, wide)
    # short chunks have many states
    with pytest.raises(ValueError, match="the states of the chunks"):
        check_scan_offsets(1, length, widths(chunk_size=16))
    with pytest.raises(ValueError, match="the products of C and B"):
        check_scan_offsets(1, length, widths(groups=24, d_state=16, chunk_size=1024))


def test_our_kernels_reach_as_far_as_the_convolution_reaches_over_in_proj():
    ours = widths(backend="triton")
    zxbcdt = torch.empty(1000, 3, sum(ours.segments), device="meta")
    xbc = zxbcdt.split(ours.segments, dim=-1)[1]
    said = scan_spans(3, 1000, ours)["in_proj's output"]
    assert 0.99 * said < span(xbc) <= said
    length = 2**32 // sum(ours.segments)
    check_scan_offsets(1, length, ours)
    check_scan_offsets(1, length, widths(backend="triton", chunk_size=16))
    with pytest.raises(ValueError, match=rf"causal-conv1d's kernels: in_proj's output spans .* {2**32:,}"):
        check_scan_offsets(1, length + 1, ours)


def test_a_tile_of_ours_has_int32_offsets():
    ours = widths(backend="triton")
    rows = 2**31 // 256 // sum(ours.segments)
    check_scan_offsets(rows, 128, ours)
    with pytest.raises(ValueError, match=f"{rows + 1} rows are too many for the scan's kernels"):
        check_scan_offsets(rows + 1, 128, ours)


def test_an_offset_just_within_reach_is_an_int32():
    assert torch.iinfo(torch.int32).max == ADDRESSABLE["mamba_ssm"] - 1
