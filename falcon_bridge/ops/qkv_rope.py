"""What lies between `linear_qkv` and core attention: q, k and v apart, RoPE on q and k, a multiplier on v."""

import torch
from torch.autograd.function import once_differentiable


def qkv_rope_reference(
    mixed_qkv: torch.Tensor, angles: torch.Tensor, value_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step by step what `qkv_rope` computes: its oracle, and its path on CPU.

    RoPE is NeoX's (https://arxiv.org/abs/2104.09864, channels i and i + d/2 a pair), as in mcore's
    `_apply_rotary_pos_emb_bshd` but in fp32, as Transformer Engine computes it.

    Args:
        mixed_qkv: `[s, b, g, (n/g + 2)·d]`: in each of g groups the query heads, the key head and the value head.
        angles: `[s, 1, 1, d]`, both halves equal, as mcore's `RotaryEmbedding` gives them.
        value_scale: Multiplier of the values.

    Returns:
        q `[s, b, n, d]`, k and v `[s, b, g, d]`, contiguous, in mixed_qkv's dtype; computed in fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(mixed_qkv.dtype, torch.float32)
    heads = mixed_qkv.unflatten(-1, (-1, angles.shape[-1])).to(wide)
    angles = angles.to(wide).unsqueeze(2)
    first, second = heads.chunk(2, dim=-1)
    rotated = heads * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
    parts = rotated[..., :-2, :].flatten(2, 3), rotated[..., -2, :], heads[..., -1, :] * value_scale
    return tuple(part.to(mixed_qkv.dtype).contiguous() for part in parts)


class _QKVRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed_qkv: torch.Tensor, angles: torch.Tensor, value_scale: float):
        from falcon_bridge.ops import qkv_rope_kernels

        ctx.save_for_backward(angles)
        ctx.value_scale = value_scale
        return qkv_rope_kernels.qkv_rope(mixed_qkv, angles, value_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor):
        from falcon_bridge.ops import qkv_rope_kernels

        (angles,) = ctx.saved_tensors
        return qkv_rope_kernels.qkv_rope_backward(dq, dk, dv, angles, ctx.value_scale), None, None


def qkv_rope(
    mixed_qkv: torch.Tensor, angles: torch.Tensor, value_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys behind RoPE, and scaled values, from the output of `linear_qkv`.

    On a GPU one kernel each way, which keeps nothing but the angles for the backward pass; once differentiable there.

    Args:
        mixed_qkv: `[s, b, g, (n/g + 2)·d]`: in each of g groups the query heads, the key head and the value head.
        angles: fp32 `[s, 1, 1, d]`, both halves equal, as mcore's `RotaryEmbedding` gives them; has no gradient.
        value_scale: Multiplier of the values.

    Returns:
        q `[s, b, n, d]`, k and v `[s, b, g, d]`, contiguous, in mixed_qkv's dtype; computed in fp32.

    Raises:
        ValueError: If the shapes do not fit together, or the angles are not fp32.
    """
    d = angles.shape[-1]
    whole_heads = mixed_qkv.dim() == 4 and d % 2 == 0 and mixed_qkv.shape[3] in range(3 * d, 1 << 30, d)
    if not whole_heads or angles.shape != (mixed_qkv.shape[0], 1, 1, d) or angles.dtype != torch.float32:
        raise ValueError(
            f"mixed_qkv {list(mixed_qkv.shape)} and {angles.dtype} angles {list(angles.shape)} do not fit together: "
            "give [s, b, groups, (heads a group + 2)·d] and fp32 [s, 1, 1, d], d even"
        )
    if mixed_qkv.is_cuda and mixed_qkv.dtype != torch.float64 and mixed_qkv.numel():
        return _QKVRope.apply(mixed_qkv, angles.contiguous(), value_scale)
    return qkv_rope_reference(mixed_qkv, angles, value_scale)
