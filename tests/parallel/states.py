"""Weights and optimizer state of a Megatron model, whole by Hugging Face name, and as sharded checkpoints."""

from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import DistributedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model


MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model, *, distributed: bool, lr: float = 1e-2):
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=distributed,
    )
    return get_megatron_optimizer(config, model.chunks)


def _metadata(sharding: str | None) -> dict:
    """What Bridge's save_checkpoint hands to sharded_state_dict; `sharding` is the distributed optimizer's format."""
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if sharding is not None:
        metadata["distrib_optim_sharding_type"] = sharding
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata


def _sharded(model, optimizer, sharding: str | None, *, loading: bool) -> dict:
    metadata = _metadata(sharding)
    chunks: list[MegatronModule] = unwrap_model(model.chunks)
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state


def save(model, optimizer, directory, sharding: str | None) -> None:
    directory.mkdir(exist_ok=True)
    dist.barrier()
    fork = filesystem_async.get_write_results_queue
    # the queue's manager process would import pytest and all of this anew
    with mock.patch.object(filesystem_async, "get_write_results_queue", lambda mode="fork": fork("fork")):
        dist_checkpointing.save(_sharded(model, optimizer, sharding, loading=False), str(directory))


def load(model, optimizer, directory, sharding: str | None) -> None:
    loaded = dist_checkpointing.load(_sharded(model, optimizer, sharding, loading=True), str(directory))
    chunks = unwrap_model(model.chunks)
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])


def snapshot(model, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, both moments and the fp32 master weights, each whole and by Hugging Face name, and Adam's step count.

    What maps a sharded weight to its Hugging Face tensor maps its moments, too: they take the weights' place for the
    length of an export.
    """
    parameters = [p for chunk in model.chunks for p in chunk.parameters() if p.requires_grad]
    weights = [p.data for p in parameters]
    state = {"weights": _export(model)}
    for name in (*MOMENTS, "master"):
        whole = [_whole(optimizer, p, name) for p in parameters]
        try:
            for parameter, tensor in zip(parameters, whole, strict=True):
                parameter.data = tensor
            state[name] = _export(model)
        finally:
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.data = weight
    state["step"] = {"step": torch.tensor(sorted(_steps(optimizer)))}
    return state


def _export(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.export()}


def _steps(optimizer) -> set[float]:
    (part,) = optimizer.chained_optimizers
    return {float(state["step"]) for state in part.optimizer.state.values()}


def _whole(optimizer, parameter, name: str) -> torch.Tensor:
    """This model-parallel rank's `name` of `parameter`, put together where data-parallel ranks share it."""
    (part,) = optimizer.chained_optimizers
    if isinstance(part, DistributedOptimizer):
        return _joined(part, parameter, "param" if name == "master" else name)
    main = getattr(parameter, "main_param", parameter)
    return (main.data if name == "master" else part.optimizer.state[main][name]).clone()


def _joined(optimizer: DistributedOptimizer, parameter, name: str) -> torch.Tensor:
    whole = torch.zeros(parameter.numel())
    if parameter in optimizer.model_param_gbuf_map:  # of which this rank holds a part
        own = optimizer._get_model_param_range_map(parameter)["param"]
        whole[own.start : own.end] = optimizer._get_main_param_and_optimizer_states(parameter)[name]
    dist.all_reduce(whole, group=optimizer.data_parallel_group)
    return whole.view_as(parameter)
