import torch

from falcon_bridge.ops.documents import check_seq_idx


def check_ssd_inputs(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> None:
    """Raise ValueError, in one line, at the first tensor whose shape or dtype does not fit the others."""
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must be [b, l, h, p] with no empty dimension, got {list(x.shape)}")
    b, length, h, p = x.shape
    if B.dim() != 4 or B.shape[:2] != x.shape[:2] or 0 in B.shape:
        raise ValueError(f"B must be [b, l, g, n] with b={b} and l={length}, got {list(B.shape)}")
    g, n = B.shape[2:]
    if h % g:
        raise ValueError(f"the number of heads ({h}) must be a multiple of the number of groups ({g})")
    expected = {
        "C": (C, [b, length, g, n]),
        "dt": (dt, [b, length, h]),
        "A": (A, [h]),
        "D": (D, [h]),
        "initial_states": (initial_states, [b, h, p, n]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for x {list(x.shape)}, B {list(B.shape)}; got {list(tensor.shape)}"
            )
    for name, tensor in {"x": x, "B": B, **{key: tensor for key, (tensor, _) in expected.items()}}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if seq_idx is not None:
        check_seq_idx(seq_idx, b, length)


def accumulate_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return float64 if any of the tensors is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
