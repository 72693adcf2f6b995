"""Megatron's tensor-parallel linear layers with BitNet b1.58 weights and activations."""

import copy
from typing import Literal

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_pg_rank, get_pg_size

from falcon_bridge.bitnet.backends import Backend, choose_backend
from falcon_bridge.bitnet.codes import CodesCache, WeightCodes, invalidate
from falcon_bridge.bitnet.function import Exchange, ternary_linear
from falcon_bridge.bitnet.segments import gate_up_row_segments, qkv_row_segments
from falcon_bridge.bitnet.strength import at_current_strength, is_scheduled


Matrices = Literal["qkv", "gate_up"]


class _BitNetLinear(torch.nn.Module):
    """What both layers have in common; the weight stays an ordinary parameter, and checkpoints those of a dense one.

    Attributes:
        row_segments: int64 `[n]` on the CPU, the Hugging Face matrix of each of this rank's rows; None for a single
            matrix.
    """

    row_segments: torch.Tensor | None

    def weight_codes(self) -> WeightCodes:
        """Codes int8 `[n, k]` and fp32 scales `[n]` or `[1]` of this rank's rows, at full quantisation strength.

        Collective over the tensor-parallel group.
        """
        backend = self._backend()
        if at_current_strength(backend) is backend:
            return self._codes.get(self.weight, backend)
        return self._codes.quantize(self.weight, backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, BitNet"

    def _backend(self) -> Backend:
        return choose_backend(getattr(self.config, "bitnet_backend", "auto"), self.weight.device.type)

    def _set_up(self, row_segments: torch.Tensor | None, elements: list[int]) -> None:
        if self.gtp_remat_size > 1:
            raise ValueError("BitNet linears need whole weights: set gtp_weight_remat_size=1")
        self.gradient_accumulation_fusion = self.config.gradient_accumulation_fusion or getattr(
            self.config, "bitnet_gradient_accumulation_fusion", False
        )
        self.row_segments = row_segments
        counts = torch.tensor(elements, dtype=torch.float64, device="cpu")
        group = self.tp_group if get_pg_size(self.tp_group) > 1 else None
        self._codes = CodesCache(counts, row_segments, group)
        self._group = group
        # Megatron's forward would add nodes to the graph that copy, reduce and gather within the group
        self._alone = group is None and not self.config.defer_embedding_wgrad_compute
        self.register_load_state_dict_post_hook(invalidate)

    def _forward_alone(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Megatron's forward in a group of one rank: the output, and the bias where somebody else adds it."""
        y = self._multiply(x, weight)
        if self.skip_bias_add:
            return y, self.bias
        return (y if self.bias is None else y + self.bias), None

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, **exchanged: bool) -> torch.Tensor:
        if weight is not self.weight:
            raise ValueError("a BitNet linear multiplies by its own weight: do not hand it another")
        if self.training and getattr(self.config, "bitnet_warmup_steps", 0) and not is_scheduled():
            raise ValueError(
                "bitnet_warmup_steps needs what raises the strength: give falcon_bridge.bitnet.callbacks."
                "bitnet_callbacks(cfg) to pretrain's callbacks, or set bitnet_warmup_steps=0"
            )
        backend = at_current_strength(self._backend())
        group = self._group
        return ternary_linear(
            x,
            weight,
            self._codes.get(weight, backend),
            backend,
            None if group is None else Exchange(group, **exchanged),
            accumulate=self.gradient_accumulation_fusion,
        )


class BitNetColumnParallelLinear(_BitNetLinear, ColumnParallelLinear):
    """`ColumnParallelLinear` whose output features, split over ranks, have ternary weights.

    Under sequence parallelism each rank quantises its tokens, and int8 codes with their scales are gathered.

    Args:
        input_size: Input features.
        output_size: Output features of all ranks.
        config: TransformerConfig; read where it has them: `bitnet_backend` (`backends.CHOICES`), and
            `bitnet_gradient_accumulation_fusion`, which like `gradient_accumulation_fusion` has the weight's gradient
            added to `main_grad` as it is computed. Neither needs APEX.
        matrices: The Hugging Face matrices that the weight fuses, each of which has its own scale: "qkv" for
            Megatron's `linear_qkv` of `config`'s heads, "gate_up" for a gated `linear_fc1`, None for a single matrix.
        pg_collection: Process groups, of which `tp` is taken where there is no `tp_group`.
        **kwargs: As `ColumnParallelLinear`.

    Raises:
        ValueError: For experts and for a weight that is not allocated here; if `matrices` does not fit the sizes.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config,
        matrices: Matrices | None = None,
        pg_collection=None,
        **kwargs,
    ) -> None:
        _check_kwargs(kwargs)
        build_config = config
        if config.gradient_accumulation_fusion:
            # the parent would ask for APEX's kernel
            build_config = copy.copy(config)
            build_config.gradient_accumulation_fusion = False
        super().__init__(input_size, output_size, config=build_config, **_with_tp_group(kwargs, pg_collection))
        self.config = config
        rows = self.output_size_per_partition
        with torch.device("cpu"):  # also where the model is built on the meta device
            whole = _row_segments(matrices, config, output_size)
            if whole is None:
                self._set_up(None, [output_size * input_size])
                return
            if matrices == "gate_up":
                local = gate_up_row_segments(rows // 2)
            else:
                local = whole.narrow(0, get_pg_rank(self.tp_group) * rows, rows)
            self._set_up(local, [count * input_size for count in whole.bincount().tolist()])

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `ColumnParallelLinear`."""
        if self._alone and self.config._cpu_offloading_context is None:
            return self._forward_alone(input_, self.weight if weight is None else weight)
        return super().forward(input_, weight, runtime_gather_output)

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **_,
    ) -> torch.Tensor:
        y = self._multiply(input, weight, gather_tokens=sequence_parallel, reduce_grad_input=allreduce_dgrad)
        return y if bias is None else y + bias


class BitNetRowParallelLinear(_BitNetLinear, RowParallelLinear):
    """`RowParallelLinear` whose input features, split over ranks, have ternary weights.

    A token's activations are scaled by the maximum over its whole row: one small all-reduce before the product.

    Args:
        input_size: Input features of all ranks.
        output_size: Output features.
        config: As `BitNetColumnParallelLinear`.
        pg_collection: Likewise.
        **kwargs: As `RowParallelLinear`.

    Raises:
        ValueError: For experts.
    """

    def __init__(self, input_size: int, output_size: int, *, config, pg_collection=None, **kwargs) -> None:
        _check_kwargs(kwargs)
        super().__init__(input_size, output_size, config=config, **_with_tp_group(kwargs, pg_collection))
        self._set_up(None, [output_size * input_size])

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `RowParallelLinear`."""
        if self._alone and self.config._cpu_offloading_context is None:
            return self._forward_alone(input_, self.weight)
        return super().forward(input_)

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, bias: None = None, **_) -> torch.Tensor:
        return self._multiply(input, weight, share_absmax=True)


def _check_kwargs(kwargs: dict) -> None:
    if kwargs.get("is_expert"):
        raise ValueError(
            "BitNet linears do not support mixtures of experts: set use_bitnet=False, or num_moe_experts=None"
        )
    if kwargs.get("skip_weight_param_allocation"):
        raise ValueError("a BitNet linear keeps its own weight: skip_weight_param_allocation must be False")


def _with_tp_group(kwargs: dict, pg_collection) -> dict:
    if kwargs.get("tp_group") is None and pg_collection is not None:
        return {**kwargs, "tp_group": pg_collection.tp}
    return kwargs


def _row_segments(matrices: Matrices | None, config, output_size: int) -> torch.Tensor | None:
    """The map of the whole weight's rows."""
    if matrices is None:
        return None
    if matrices == "qkv":
        groups = config.num_query_groups or config.num_attention_heads
        row_segments = qkv_row_segments(config.num_attention_heads, groups, config.kv_channels)
    elif matrices == "gate_up":
        row_segments = gate_up_row_segments(output_size // 2)
    else:
        raise ValueError(f"matrices={matrices!r} is not one of 'qkv', 'gate_up' and None")
    if len(row_segments) != output_size:
        raise ValueError(
            f"a {matrices} weight of {output_size} rows does not fit the config, by which it has {len(row_segments)}"
        )
    return row_segments
