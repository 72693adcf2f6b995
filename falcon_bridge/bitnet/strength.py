"""Quantisation strength λ: from a dense model (0) to a ternary one (1), for warming a dense checkpoint up to BitNet.

Below 1 activations and weights are ``v + λ·(Q(v) - v)`` and the products dense; gradients take that for the identity,
as at full strength. At 1, the default, the codes themselves are multiplied.
"""

from dataclasses import dataclass

import torch

from falcon_bridge.bitnet.backends import Backend


_strength = 1.0
_scheduled = False


def quantization_strength() -> float:
    """The current λ of all BitNet linears of this process."""
    return _strength


def set_quantization_strength(strength: float) -> None:
    """Set λ for all BitNet linears of this process, from their next forward pass on.

    To be set on all ranks alike and between optimizer steps, not while micro-batches are in flight.

    Args:
        strength: λ, from 0 (dense) to 1 (ternary).

    Raises:
        ValueError: λ is not in that range.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"the quantisation strength must be from 0 (dense) to 1 (ternary), got {strength}")
    global _strength, _scheduled
    _strength, _scheduled = float(strength), True


def is_scheduled() -> bool:
    """Whether anything in this process has set λ."""
    return _scheduled


def at_current_strength(backend: Backend) -> Backend:
    """`backend` itself at full strength, a `BlendedBackend` around it below."""
    return backend if _strength == 1.0 else BlendedBackend(backend, _strength)


@dataclass(frozen=True)
class BlendedBackend:
    """A `backends.Backend` of blended values in place of codes, with scales of 1; equal ones have equal results.

    Attributes:
        quantizer: What quantises.
        strength: λ, below 1.
    """

    quantizer: Backend
    strength: float

    @property
    def name(self) -> str:
        """That of the quantiser, and λ."""
        return f"{self.quantizer.name} at strength {self.strength:g}"

    def quantize_activation(
        self, x: torch.Tensor, absmax: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blended activations `[m, k]` in x's dtype, contiguous, and ones `[m, 1]`."""
        codes, scale = self.quantizer.quantize_activation(x, absmax)
        return self._blend(x, codes, scale), torch.ones_like(scale)

    def abs_row_sums(self, W: torch.Tensor) -> torch.Tensor:
        """Those of the quantiser."""
        return self.quantizer.abs_row_sums(W)

    def quantize_weight(self, W: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
        """The blended weight `[n, k]` in W's dtype."""
        return self._blend(W, self.quantizer.quantize_weight(W, row_scales), row_scales[:, None])

    def forward(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        weight_codes: torch.Tensor,
        row_scales: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The dense product `[m, n]` of blended activations and weights."""
        return (codes @ weight_codes.to(codes.dtype).T).to(dtype)

    def grad_input(
        self, grad: torch.Tensor, weight_codes: torch.Tensor, row_scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """``grad @ W`` `[m, k]`."""
        return (grad @ weight_codes.to(grad.dtype)).to(dtype)

    def grad_weight(
        self,
        grad: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        main_grad: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """``gradᵀ @ x`` `[n, k]`; added to `main_grad`, and None, where that is given."""
        grad_weight = grad.T @ codes.to(grad.dtype)
        if main_grad is None:
            return grad_weight.to(dtype)
        main_grad.add_(grad_weight)
        return None

    def _blend(self, value: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.lerp(value.float(), codes.float() / scale, self.strength).to(value.dtype).contiguous()
