import pytest
import torch

from falcon_bridge.bitnet.segments import check_row_segments, check_weight, gate_up_row_segments, qkv_row_segments


def test_qkv_rows_follow_the_groups():
    assert qkv_row_segments(4, 2, 1).tolist() == [0, 0, 1, 2, 0, 0, 1, 2]
    assert qkv_row_segments(3, 1, 2).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert qkv_row_segments(16, 2, 128).bincount().tolist() == [16 * 128, 2 * 128, 2 * 128]


def test_gate_rows_come_before_up_rows():
    assert gate_up_row_segments(3).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("heads", [(5, 2, 4), (0, 1, 4), (2, 4, 4), (4, 0, 4), (4, 2, 0)])
def test_heads_that_do_not_divide_are_refused(heads):
    with pytest.raises(ValueError, match="positive multiple of num_query_groups"):
        qkv_row_segments(*heads)


@pytest.mark.parametrize(
    "row_segments, message",
    [
        (torch.tensor([0, 1, 2]), "ids from 0 to 2"),
        (torch.tensor([0, -1, 1]), "ids from -1 to 1"),
        (torch.tensor([0, 1]), r"int64 \[3\], one id a row"),
        (torch.tensor([0.0, 1.0, 1.0]), "got torch.float32"),
        (torch.tensor([[0], [1], [1]]), r"got torch.int64 \[3, 1\]"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(row_segments, message):
    with pytest.raises(ValueError, match=message):
        check_row_segments(row_segments, 2, 3)


@pytest.mark.parametrize(
    "W, num_segments, message",
    [
        (torch.ones(3), 1, r"matrix \[out, in\], got torch.float32 \[3\]"),
        (torch.ones(3, 3, dtype=torch.int8), 1, "got torch.int8"),
        (torch.ones(3, 3), 3, "needs row_segments"),
    ],
)
def test_a_weight_that_cannot_be_ternary_is_refused(W, num_segments, message):
    with pytest.raises(ValueError, match=message):
        check_weight(W, None, num_segments)
