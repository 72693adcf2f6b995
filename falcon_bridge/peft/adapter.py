"""The low-rank adapter of one linear layer, and how its rows lie on the tensor-parallel ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.bridge.peft.utils import ParallelLinearAdapter
from megatron.core.ssm.utils import _split_tensor_factory
from torch import Tensor, nn


COLUMN_PARALLEL = ("linear_qkv", "in_proj", "linear_fc1")
ROW_PARALLEL = ("linear_proj", "out_proj", "linear_fc2")


@dataclass(frozen=True)
class RowSections:
    """Parts of a fused linear layer's output, each of which is split over the tensor-parallel ranks by itself.

    Attributes:
        names: of the parts, as they appear in checkpoints; one empty name where the layer is not fused.
        sizes: rows of each on one rank.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, linear: nn.Module, name: str) -> "RowSections":
        """Those of the layer called `name` in a Falcon-H1 model."""
        rows = linear.weight.shape[0]
        if name == "in_proj":
            return cls(("z", "x", "B", "C", "dt"), tuple(linear.weight.partition_sizes))
        if name == "linear_fc1" and linear.config.gated_linear_unit:
            return cls(("gate", "up"), (rows // 2, rows // 2))
        return cls(("",), (rows,))


class Adapter(ParallelLinearAdapter):
    """`x ↦ B·A·x·alpha/dim`, its rows sharded as those of the layer that it adapts.

    `linear_in` is A `[dim, in]`, `linear_out` is B `[out, dim]`; each rank has a part of both.

    Args:
        linear: the layer to adapt.
        full_name: its path in the model.
        dim: rank of the product.
        alpha: scale, times dim.
        dropout: of the adapter's input.
        init_method: of A ("xavier", "normal" or "kaiming"); B starts at zero.
    """

    def __init__(
        self, linear: nn.Module, full_name: str, *, dim: int, alpha: float, dropout: float, init_method: str
    ) -> None:
        tp_size = linear.config.tensor_model_parallel_size
        name = full_name.rpartition(".")[2]
        rows, columns = linear.weight.shape
        super().__init__(
            columns * tp_size if name in ROW_PARALLEL else columns,
            rows * tp_size if name in COLUMN_PARALLEL else rows,
            dim,
            base_linear_name=full_name,
            activation="identity",
            column_init_method=init_method,
            row_init_method="zero",
            input_is_parallel=name in ROW_PARALLEL,
            dropout=dropout,
            dropout_position="pre",
            model_parallel_config=linear.config,
            alpha=alpha,
            disable_sequence_parallel_comm=not linear.config.sequence_parallel,
        )
        self.sections = RowSections.of(linear, name)

    def product(self, dtype: torch.dtype | None = None) -> Tensor:
        """`B·A·alpha/dim` of the rows and columns that the adapted layer has on this rank.

        Args:
            dtype: to compute in; the adapter's where None.
        """
        down, up = self.linear_in.weight.to(dtype), self.linear_out.weight.to(dtype)
        if self.tp_group.size() > 1:
            if self.input_is_parallel:
                up = self._gathered(up)
            else:
                down = self._gathered(down)
        return (up @ down) * (self.alpha / self.dim)

    def _gathered(self, shard: Tensor) -> Tensor:
        parts = [torch.empty_like(shard) for _ in range(self.tp_group.size())]
        dist.all_gather(parts, shard.contiguous(), group=self.tp_group)
        return torch.cat(parts)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As the parent's, with the parts of a fused layer's rows as tensors of their own."""
        state = self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata)
        state |= self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata)
        self._split_rows(state, f"{prefix}linear_out.weight")
        return state

    def _split_rows(self, state: dict, key: str) -> None:
        if len(self.sections.names) > 1:
            state[key] = _split_tensor_factory(state[key], list(self.sections.sizes), list(self.sections.names), 0)
