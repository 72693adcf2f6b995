"""An estimate of a training step's memory on each pipeline rank, from the shapes of the model.

It counts what torch's allocator hands out at its peak (``torch.cuda.max_memory_allocated``). What comes on top of that
is `RESERVE`. docs/training.md says how; benchmarks/memory_estimate.py holds it against measured peaks.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from falcon_bridge.training.activations import backward_workspace, kept_tensors, loss_workspace, saved_tensors
from falcon_bridge.training.parameters import (
    adapted,
    adapter_parameters,
    count_parameters,
    linear_parameters,
    stage_parameters,
)
from falcon_bridge.training.shapes import LayerKind, RankShapes, rank_shapes, stage_chunks


__all__ = [
    "CONTEXT",
    "FRAGMENTATION",
    "GPU_MEMORY",
    "RESERVE",
    "StageMemory",
    "count_parameters",
    "estimate_memory",
    "usable_memory",
]

GPU_MEMORY = 79 * 2**30
"""What the driver reports of an "80 GB" H100, rounded down, in bytes."""
CONTEXT = 2 * 2**30
"""Outside torch's allocator, in bytes a GPU: the CUDA context with its loaded kernels, NCCL's buffers."""
FRAGMENTATION = 2 * 2**30
"""Left for what the allocator holds but cannot hand out in one piece, in bytes a GPU."""
RESERVE = CONTEXT + FRAGMENTATION
"""Left free of what a rank's tensors take, in bytes a GPU."""

_WORKSPACES = 2 * 32 * 2**20
"""cuBLAS workspaces on Hopper, 32 MiB each, that torch and Transformer Engine keep in torch's allocator."""
_ROUNDING = 0.015
"""Share by which the allocator's blocks exceed the long-lived tensors in them: blocks from 10 MiB on are multiples of
2 MiB, and rests under 1 MiB stay with the block."""


def usable_memory() -> int:
    """Bytes that a rank's tensors may take, of this machine's smallest GPU; of an 80 GB H100 where there is none."""
    import torch

    devices = range(torch.cuda.device_count())
    smallest = min((torch.cuda.get_device_properties(device).total_memory for device in devices), default=GPU_MEMORY)
    return smallest - RESERVE


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage at the peak of a training step.

    Attributes:
        weights: parameters in the model's dtype.
        gradients: the accumulation buffers.
        optimizer: main weights (where the model's are not fp32) and Adam's two moments, this rank's shard.
        activations: what all micro-batches in flight keep for their backward passes.
        workspace: the largest of logits with cross entropy, a layer's recomputation and its backward's temporaries;
            then what libraries keep for themselves, CUDA graphs' static inputs and the allocator's rounding.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def state(self) -> int:
        """What stays between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """All of it."""
        return self.state + self.activations + self.workspace

    def as_dict(self) -> dict[str, int]:
        """By name, with `state` and `peak`."""
        return {**asdict(self), "state": self.state, "peak": self.peak}


def estimate_memory(cfg: Any, world_size: int) -> list[StageMemory]:
    """Memory of a training step, for a rank of each pipeline stage.

    Args:
        cfg: a ``ConfigContainer`` whose provider is finalized.
        world_size: number of ranks.
    """
    model = cfg.model
    packed = getattr(cfg.dataset, "inter_document_masking", True)  # chats are packed, too
    shapes = rank_shapes(model, cfg.train.micro_batch_size, half=_precision(cfg)[0], packed=packed)
    stages = []
    for stage in range(model.pipeline_model_parallel_size):
        state = _state(cfg, world_size, stage)
        activations, workspace = _activations(cfg, world_size, stage, shapes)
        workspace += _held(cfg, world_size) + int(_ROUNDING * sum(state))
        stages.append(StageMemory(*state, activations, workspace))
    return stages


def _held(cfg: Any, world_size: int) -> int:
    """Bytes that stay allocated for no tensor of the model."""
    if cfg.model.cuda_graph_impl == "none":
        return _WORKSPACES
    # a graph has cuBLAS workspaces of its own, and reads tokens, labels, positions (int64), the mask (fp32) and the
    # borders of documents (int32) of all micro-batches from buffers that each step's rows are copied into
    validation = cfg.validation.eval_global_batch_size if cfg.validation.eval_iters else 0
    rows = cfg.train.global_batch_size + (cfg.train.global_batch_size if validation is None else validation)
    token = 3 * 8 + 4 + 4 * bool(getattr(cfg.dataset, "inter_document_masking", False))
    return 2 * _WORKSPACES + rows // _replicas(cfg, world_size) * cfg.model.seq_length * token


def _state(cfg: Any, world_size: int, stage: int) -> tuple[int, int, int]:
    model, tp, pp = cfg.model, cfg.model.tensor_model_parallel_size, cfg.model.pipeline_model_parallel_size
    layers = [kind for chunk in stage_chunks(model, stage) for kind in chunk]
    element, gradient, state = _bytes_a_parameter(cfg)
    parameters = stage_parameters(model, layers, stage)
    weights, trained = parameters * element, parameters
    if getattr(model, "use_bitnet", False):
        weights += sum(linear_parameters(model, kind, tp) for kind in layers)  # int8 codes, kept between micro-batches
    if cfg.peft is not None:
        trained = sum(adapter_parameters(model, cfg.peft, kind) for kind in layers)
        weights += trained * element
    # data-parallel and context-parallel ranks share the optimizer
    shards = max(1, world_size // (tp * pp)) if cfg.ddp.use_distributed_optimizer else 1
    return weights, trained * gradient, math.ceil(trained * state / shards)


def _precision(cfg: Any) -> tuple[bool, bool]:
    """Whether the model is in 16 bits, and its gradients added up in 32."""
    if cfg.mixed_precision is None:
        return cfg.model.bf16 or cfg.model.fp16, cfg.ddp.grad_reduce_in_fp32
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    mixed = get_mixed_precision_config(cfg.mixed_precision)
    return mixed.bf16 or mixed.fp16, mixed.grad_reduce_in_fp32


def _bytes_a_parameter(cfg: Any) -> tuple[int, int, int]:
    """Of the weight, its gradient and its optimizer state."""
    (half, wide_gradients), optimizer = _precision(cfg), cfg.optimizer
    gradient = 4 if wide_gradients or not half else 2
    if not half:
        return 4, 4, 8
    if not optimizer.use_precision_aware_optimizer:
        return 2, gradient, 12
    main = optimizer.main_params_dtype.itemsize
    if optimizer.store_param_remainders and main == 4:
        main = 2  # TE FusedAdam keeps the 16 bits that bf16 lacks
    return 2, gradient, main + optimizer.exp_avg_dtype.itemsize + optimizer.exp_avg_sq_dtype.itemsize


def _activations(cfg: Any, world_size: int, stage: int, shapes: RankShapes) -> tuple[int, int]:
    model, pp = cfg.model, cfg.model.pipeline_model_parallel_size
    chunks = stage_chunks(model, stage)
    flights = _in_flight(cfg, world_size, stage)
    kept = sum(
        count * (kept_bytes(model, shapes, chunk) + _adapters(cfg, shapes, chunk))
        for count, chunk in zip(flights, chunks, strict=True)
    )
    kinds = {kind for chunk in chunks for kind in chunk}
    workspace = [_backward(model, shapes, kind) for kind in kinds]
    if stage == pp - 1:
        workspace.append(loss_workspace(shapes, model))
    # point-to-point buffers: a hidden state and a gradient each way
    between = 4 * shapes.sharded_tokens * shapes.hidden * shapes.residual if pp > 1 else 0
    return kept, max(workspace, default=0) + between


def _in_flight(cfg: Any, world_size: int, stage: int) -> list[int]:
    """Micro-batches whose activations are held at once, for each virtual stage of a pipeline rank."""
    model, pp = cfg.model, cfg.model.pipeline_model_parallel_size
    microbatches = max(1, cfg.train.global_batch_size // (cfg.train.micro_batch_size * _replicas(cfg, world_size)))
    virtual = model.virtual_pipeline_model_parallel_size if pp > 1 else None
    if not virtual:
        return [min(pp - stage, microbatches)]
    # mcore's get_pp_rank_microbatches: the warm-up goes through the virtual stages in groups of micro-batches
    group = model.microbatch_group_size_per_vp_stage or pp
    total = min((pp - stage - 1) * 2 + (virtual - 1) * group + 1, microbatches * virtual)
    counts = [0] * virtual
    for index in range(total):
        counts[index // group % virtual] += 1
    return counts


def _replicas(cfg: Any, world_size: int) -> int:
    model = cfg.model
    layout = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * (model.context_parallel_size or 1)
    return max(1, world_size // layout)


def kept_bytes(model: Any, shapes: RankShapes, chunk: list[LayerKind]) -> int:
    """Bytes that one micro-batch keeps for the backward pass in the layers of a model chunk.

    Args:
        model: a finalized provider.
        shapes: of the rank.
        chunk: its layers.
    """
    full = model.recompute_granularity == "full"
    block = model.recompute_num_layers or 0
    hidden = shapes.sharded_tokens * shapes.hidden * shapes.residual
    if model.distribute_saved_activations:
        hidden //= model.tensor_model_parallel_size
    if full and model.recompute_method == "uniform":
        return math.ceil(len(chunk) / max(1, block)) * hidden
    checkpointed = min(block, len(chunk)) if full else 0
    return checkpointed * hidden + sum(
        sum(kept_tensors(saved_tensors(shapes, kind, model), shapes, kind, model).values())
        for kind in chunk[checkpointed:]
    )


def _adapters(cfg: Any, shapes: RankShapes, chunk: list[LayerKind]) -> int:
    """Bytes that adapters keep beyond what their layers do: A·x, and under sequence parallelism the gathered x."""
    if cfg.peft is None or cfg.model.recompute_granularity == "full":
        return 0
    gathered = (shapes.tokens - shapes.sharded_tokens) * shapes.hidden
    return sum(
        (shapes.tokens * cfg.peft.dim + (gathered if linear.column else 0)) * shapes.element
        for kind in chunk
        for linear in adapted(cfg.model, cfg.peft, kind)
    )


def _backward(model: Any, shapes: RankShapes, kind: LayerKind) -> int:
    """Bytes at the worst moment of a layer's backward beyond what is kept: what is recomputed, and temporaries."""
    saved, temporaries = saved_tensors(shapes, kind, model), backward_workspace(shapes, kind, model)
    if model.recompute_granularity == "full":
        layers = model.recompute_num_layers if model.recompute_method == "uniform" else 1
        again = sum(saved.values()) * (layers or 1)
        # the mixer's backward comes last, when what the MLP saved is gone
        gone = {"self_attention": _of_part(saved, "mlp")}
        return max(again - gone.get(part, 0) + size for part, size in temporaries.items())
    kept = kept_tensors(saved, shapes, kind, model)
    return max(_of_part(saved, part) - _of_part(kept, part) + size for part, size in temporaries.items())


def _of_part(sizes: dict[str, int], part: str) -> int:
    return sum(size for name, size in sizes.items() if name.split(".")[0] == part)
