"""Training steps of released shapes on one GPU and on several: tokens a second, efficiency, communication."""

import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multi_gpu.cases import Case
from benchmarks.multi_gpu.exposed import shares_of_step
from falcon_bridge.verification.layout import ParallelLayout


WARM_UP, TIMED, PROFILED = 3, 6, 2


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        name: for the table.
        provider: class in `falcon_bridge`.
        fields: provider fields on top.
        rows: of each data-parallel rank.
        seq_length: tokens a row.
    """

    name: str
    provider: str
    rows: int
    seq_length: int
    fields: dict[str, Any] = field(default_factory=dict)


FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 96,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_state_dim": 16,
    "vocab_size": 131,
}


def cases(world_size: int, *, on_gpu: bool) -> list[Case]:
    """Each workload on one GPU, then on several."""
    if on_gpu:
        # as many tokens as fit one GPU: with few the host would be what is measured
        large = Workload("7B, 8 of 44 layers", "FalconH1ModelProvider7B", 3, 4096, {"num_layers": 8})
        small = Workload("0.5B, mixer recomputed", "FalconH1ModelProvider500M", 12, 4096, {"recompute_mixer": True})
        long = Workload(
            "1.5B, 12 of 24 layers, full recompute",
            "FalconH1ModelProvider1P5B",
            1,
            32768,
            {"num_layers": 12, **FULL_RECOMPUTE},
        )
    else:
        large, long, small = (
            Workload(name, "FalconH1ModelProvider500M", 2, 64, TINY) for name in ("tiny", "tiny, long", "tiny, data")
        )
    no_context = None if on_gpu else "context-parallel attention needs Transformer Engine, so GPUs"

    def pair(workload: Workload, layout: ParallelLayout, skip: str | None = None) -> list[Case]:
        size = f"{workload.rows} × {workload.seq_length} tokens"
        one, several = (f"{workload.name}, {size}: {x}" for x in (ParallelLayout(), layout))
        return [
            Case(one, measure, (workload, ParallelLayout()), skip, ranks=1),
            Case(several, measure, (workload, layout), skip, ranks=world_size),
        ]

    return [
        *pair(large, ParallelLayout(tp=world_size, sequence_parallel=True)),
        *pair(long, ParallelLayout(cp=world_size), no_context),
        *pair(small, ParallelLayout(dp=world_size, distributed_optimizer=True)),
    ]


def measure(workload: Workload, layout: ParallelLayout) -> dict[str, Any] | None:
    """Train on random tokens, and time it.

    Returns:
        On rank 0 `tokens_per_second` of all ranks, `step_ms` (median), `tflops` a rank, `communication`,
        `communication_exposed` and `idle` (shares of the step), `peak_gib`, `loss`.
    """
    from megatron.core.utils import get_model_config

    from falcon_bridge.training.flops import falcon_h1_flops

    model, optimizer = _build(workload, layout)
    step = _step(model, optimizer, workload, layout)
    losses = [step() for _ in range(WARM_UP)]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(TIMED):
        _synchronize()
        began = time.perf_counter()
        losses.append(step())
        _synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    flops = falcon_h1_flops(get_model_config(model), layout.dp * workload.rows)
    row: dict[str, Any] = {
        "workload": workload.name,
        "layout": {name: size for name, size in asdict(layout).items() if size},
        "step_ms": median * 1e3,
        "spread_ms": (max(seconds) - min(seconds)) * 1e3,
        "tokens_per_second": layout.dp * workload.rows * workload.seq_length / median,
        "tflops": flops / median / dist.get_world_size() / 1e12,
        "loss": losses[-1].item(),
    }
    if on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED):
                step()
            _synchronize()
        row |= shares_of_step(profile, PROFILED, median)
    finite = all(math.isfinite(loss.item()) for loss in losses)
    return {"ok": finite, "error": "" if finite else "the loss is not finite", **row} if dist.get_rank() == 0 else None


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def _build(workload: Workload, layout: ParallelLayout):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    import falcon_bridge

    provider = getattr(falcon_bridge, workload.provider)(**workload.fields)
    provider.apply_overrides_and_finalize(
        dtype=torch.bfloat16,
        overrides={
            **layout.provider_fields(),
            "pipeline_dtype": torch.bfloat16,
            "seq_length": workload.seq_length,
            "cross_entropy_loss_fusion": True,
        },
    )
    provider.initialize_model_parallel(seed=1)
    overlap = layout.dp * layout.cp > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and layout.distributed_optimizer,
    )
    (model,) = provider.provide_distributed_model(ddp_config=ddp_config, data_parallel_random_init=False)
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-5,
        bf16=True,
        params_dtype=torch.bfloat16,
        clip_grad=1.0,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=ddp_config.overlap_param_gather,
    )
    return model, get_megatron_optimizer(config, [model])


def _step(model, optimizer, workload: Workload, layout: ParallelLayout):
    """A function that trains on one batch and returns its loss, still on the device."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    vocabulary = get_model_config(model).vocab_size
    tokens = torch.randint(0, vocabulary, (workload.rows, workload.seq_length), generator=generator).to(device)
    positions = torch.arange(workload.seq_length, device=device)[None].expand_as(tokens)
    batch = {"tokens": tokens, "position_ids": positions.contiguous(), "labels": tokens.roll(-1, 1)}
    if layout.cp > 1:
        group = parallel_state.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)

    def step() -> torch.Tensor:
        model.zero_grad_buffer()
        loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).float().mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        return loss.detach()

    return step


def with_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `efficiency`: tokens a second over those of as many single GPUs."""
    alone = {row["workload"]: row["tokens_per_second"] for row in rows if row.get("workload") and row["world"] == 1}
    return [
        {**row, "efficiency": row["tokens_per_second"] / (row["world"] * alone[row["workload"]])}
        if row["world"] > 1 and row.get("workload") in alone
        else row
        for row in rows
    ]
