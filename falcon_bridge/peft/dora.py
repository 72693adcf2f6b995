"""DoRA: LoRA for the direction of each row of a weight, with a trained length of its own (arXiv 2402.09353)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from falcon_bridge.peft.adapter import Adapter
from falcon_bridge.peft.lora import LoRA, LoRALinear


class DoRAAdapter(Adapter):
    """An `Adapter` with the length of each row: `weight_magnitude`, fp32 `[out]`, sharded as the layer's rows."""

    def start_from(self, norm: Tensor) -> None:
        """Begin with the rows' own lengths, so that the layer does what it did."""
        self.weight_magnitude = nn.Parameter(norm.clone())
        self._keep_in_float32_parameter_names = ("weight_magnitude",)
        if self.input_is_parallel:
            # a rank sees a part of the tokens only: Megatron sums such gradients over the ranks
            self.weight_magnitude.sequence_parallel = self.config.sequence_parallel
        else:
            set_tensor_model_parallel_attributes(self.weight_magnitude, True, 0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As the parent's, with the lengths."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state |= make_sharded_tensors_for_checkpoint(
            {"weight_magnitude": self.weight_magnitude},
            prefix,
            {} if self.input_is_parallel else {"weight_magnitude": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        self._split_rows(state, f"{prefix}weight_magnitude")
        return state


class DoRALinear(LoRALinear):
    """A frozen linear layer with a DoRA adapter: `m·(W·x + B·A·x·alpha/dim) / ‖W + B·A·alpha/dim‖`, row by row."""

    adapter: DoRAAdapter

    def __init__(self, to_wrap: nn.Module, adapter: DoRAAdapter) -> None:
        super().__init__(to_wrap, adapter)
        adapter.start_from(self._norm())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The wrapped layer's output with the adapter's, and its bias.

        As in section 4.3 of the paper, the norm is a constant to the backward pass.
        """
        output, bias, adapter_input = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return output, bias
        scale = (self.adapter.weight_magnitude / self._norm()).to(output.dtype)
        return scale * (output + self.adapter(adapter_input.contiguous()).reshape(output.shape)), bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """This rank's part of the weight of one linear layer that does the same, fp32 `[out/tp, in]`."""
        merged = super().merged_weight()
        return merged * (self.adapter.weight_magnitude / self._norm())[:, None]

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Length of each of this rank's rows of `W + B·A·alpha/dim`, over the columns of all ranks; fp32."""
        weight = self.weight + self.adapter.product().to(self.weight.dtype)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        if self.adapter.input_is_parallel and self.adapter.tp_group.size() > 1:
            dist.all_reduce(squares, group=self.adapter.tp_group)
        return squares.sqrt()


@dataclass
class DoRA(LoRA):
    """DoRA for Falcon-H1; the fields are `LoRA`'s, without dropout."""

    alpha: float = 64

    def check(self, config: Any) -> None:
        """Refuse what `LoRA.check` refuses, and dropout.

        Args:
            config: a `FalconH1ModelProvider`.

        Raises:
            ValueError: with one line that says what to change.
        """
        if self.dropout:
            raise ValueError(f"peft.dropout={self.dropout} is not supported with DoRA: set it to 0, or use LoRA")
        super().check(config)

    def _wrap(self, linear: nn.Module, full_name: str) -> DoRALinear:
        return DoRALinear(linear, self._adapter(DoRAAdapter, linear, full_name))
