"""What follows the scan of Mamba-2: the gate, its multiplier, and optionally an RMSNorm over groups of channels."""

import torch
import torch.nn.functional as F


def gated_norm_reference(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    gate_scale: float = 1.0,
    out_scale: float = 1.0,
    group_width: int | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``norm(y · silu(z · gate_scale)) · weight · out_scale``, step by step: the oracle of the fused kernels.

    Args:
        y: Output of the scan `[..., d]`.
        z: Gate `[..., d]`.
        weight: Of the RMSNorm `[d]`; without it there is no norm.
        gate_scale: Multiplier inside the SiLU (`ssm_in_multiplier` times z's of `ssm_multipliers`).
        out_scale: Multiplier of the result (`ssm_out_multiplier`, which commutes with the projection that follows).
        group_width: Channels that are normalised together; d where None.
        eps: Added to the mean square.

    Returns:
        `[..., d]` in y's dtype; computed in fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    gated = y.to(wide) * F.silu(z.to(wide) * gate_scale)
    if weight is not None:
        groups = gated.unflatten(-1, (-1, group_width or gated.shape[-1]))
        gated = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    return (gated * out_scale).to(y.dtype)
