"""Optimizer state in checkpoints, where Megatron's optimizers lose track of it.

- A model that keeps some parameters in fp32 under bf16, as Falcon-H1 keeps A_log, D and dt_bias, trains rightly, but
  both optimizers mix up which state belongs to which parameter when it is saved or loaded: they fail or, where shapes
  agree, swap states.
- The distributed optimizer's reshardable format takes the buckets of its buffer to be adjacent. Where one is padded at
  its end (tied embeddings under pipeline parallelism, overlapped gradient reduction with widths that are not multiples
  of 128) everything behind it is written shifted, without an error.
- The distributed optimizer cannot load its state into torch's Adam (its base without Transformer Engine or APEX), and
  would let all parameters share one step count, which each of them then advances in every step.

Models without these properties see no difference.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params


def repair_optimizer_state() -> None:
    """Let both optimizers find the state of each parameter; may be called again."""
    distributed, plain = DistributedOptimizer, Float16OptimizerWithFloat16Params
    if hasattr(distributed.sharded_state_dict, "__wrapped__"):
        return
    build = distributed._build_optimizer_group_ranges.__func__
    distributed._build_optimizer_group_ranges = classmethod(_with_fp32_first(build))
    distributed.sharded_state_dict = _with_state_to_load_into(distributed.sharded_state_dict)
    distributed.load_state_dict = _with_a_step_each(distributed.load_state_dict)
    distributed._set_main_param_and_optimizer_states = _but_the_step(distributed._set_main_param_and_optimizer_states)
    distributed.sharded_param_state_fully_reshardable = _with_padded_buckets(
        distributed.sharded_param_state_fully_reshardable
    )
    plain.sharded_state_dict = _by_position(plain.sharded_state_dict)


def _with_fp32_first(build_optimizer_group_ranges: Callable) -> Callable:
    """Order each group as the optimizer that is built from it will: its fp32 parameters before the others.

    `DistributedOptimizer._build_model_and_main_param_groups` puts them first, after their positions were recorded.
    """

    @wraps(build_optimizer_group_ranges)
    def build(cls, param_groups: list[dict], gbuf_ranges: list[dict]) -> tuple[dict, list[dict]]:
        places, group_ranges = build_optimizer_group_ranges(cls, param_groups, gbuf_ranges)
        for index, group in enumerate(group_ranges):
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            places.update({parameter: (index, order) for order, parameter in enumerate(group["params"])})
        return places, group_ranges

    return build


def _with_padded_buckets(original: Callable) -> Callable:
    """Lay the gathered state out as `param_index_map` indexes it: each bucket at its own offset in the buffer."""

    @wraps(original)
    def sharded_param_state_fully_reshardable(self, *args, **kwargs):
        gather = self.get_parameter_state_dp_zero

        def padded(**arguments) -> dict | None:
            state = gather(**arguments)
            for index, buffer in enumerate(self.buffers):
                if state is not None and len(buffer.buckets) > 1 and buffer.numel_unpadded < buffer.numel:
                    state[index] = {dtype: _spread(world, buffer) for dtype, world in state[index].items()}
            return state

        self.get_parameter_state_dp_zero = padded
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return sharded_param_state_fully_reshardable


def _spread(world: dict[str, Any], buffer) -> dict[str, Any]:
    tensors = {name: torch.zeros(buffer.numel) for name, value in world.items() if isinstance(value, torch.Tensor)}
    start = 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        for name, tensor in tensors.items():
            tensor[bucket.offset : bucket.offset + bucket.numel_unpadded] = world[name][start:end]
        start = end
    return {**world, **tensors}


def _with_state_to_load_into(original: Callable) -> Callable:
    """Torch's Adam has no state before its first step, which `DistributedOptimizer.state_dict` takes for granted."""

    @wraps(original)
    def sharded_state_dict(self, model_sharded_state_dict: dict, is_loading: bool = False, **kwargs):
        if is_loading and isinstance(self.optimizer, torch.optim.Adam) and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return original(self, model_sharded_state_dict, is_loading, **kwargs)

    return sharded_state_dict


def _with_a_step_each(original: Callable) -> Callable:
    """Give each parameter its own step count after loading into torch's Adam, which counts in place."""

    @wraps(original)
    def load_state_dict(self, state_dict: dict) -> None:
        original(self, state_dict)
        if isinstance(self.optimizer, torch.optim.Adam):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load_state_dict


def _but_the_step(original: Callable) -> Callable:
    """Torch's Adam keeps its step count beside the moments; checkpoints have it in the parameter groups.

    Without gradients, because the shard of an fp32 parameter is a view of that parameter.
    """

    @wraps(original)
    @torch.no_grad()
    def set_states(self, model_param, tensors: dict) -> None:
        original(self, model_param, {**tensors, "step": None})

    return set_states


def _by_position(original: Callable) -> Callable:
    """`sharded_state_dict` that numbers all parameters, not the bf16 ones alone, as the inner optimizer does."""

    @wraps(original)
    def sharded_state_dict(
        self, model_sharded_state_dict: dict, is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        if not any(self.fp32_from_fp32_groups):
            return original(self, model_sharded_state_dict, is_loading, metadata)
        if is_loading:
            self.init_state_fn(self.optimizer, self.config)
        state = self.state_dict()
        model_parameter = {
            main: parameter
            for mains, parameters in zip(self.fp32_from_float16_groups, self.float16_groups, strict=True)
            for main, parameter in zip(mains, parameters, strict=True)
        }
        mains = [main for group in self.optimizer.param_groups for main in group["params"]]
        position = {main: i for i, main in enumerate(mains)}
        sharded = get_param_id_to_sharded_param_map(
            model_sharded_state_dict, [model_parameter.get(main, main) for main in mains]
        )
        state["fp32_from_fp16_params"] = [
            [
                make_sharded_optimizer_tensor(sharded[position[main]], main, prefix="optimizer.state.fp32_param")
                for main in group
            ]
            for group in state["fp32_from_fp16_params"]
        ]
        step = self._extract_common_per_param_step(state["optimizer"])
        optim_state_to_sharding_state(state["optimizer"], sharded, exclude_keys="step")
        if step:
            state["optimizer"]["state"]["common_step"] = step
        return state

    return sharded_state_dict
