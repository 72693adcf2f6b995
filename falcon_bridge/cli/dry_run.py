"""What ``train --dry-run`` shows: the resolved configuration, arithmetic, and memory against a GPU's."""

from typing import Any

from falcon_bridge.cli.session import Session


_GIB = 2**30
_COMPONENTS = ("weights", "gradients", "optimizer", "activations", "workspace", "peak")


def dry_run(current: Session, cfg: Any, processes: int | None) -> dict[str, Any]:
    """Show what a training of `cfg` would be.

    Args:
        current: where to.
        cfg: a ``ConfigContainer`` whose provider is finalized.
        processes: ranks that the user asked for; otherwise this machine's GPUs, or the fewest that it fits on.

    Returns:
        The object of ``--json``.

    Raises:
        UserError: `processes` ranks cannot hold the layout, or share the batch.
    """
    from megatron.bridge.training.utils.omegaconf_utils import create_omegaconf_dict_config
    from omegaconf import OmegaConf
    from rich.syntax import Syntax

    from falcon_bridge.training.memory import count_parameters, estimate_memory, usable_memory
    from falcon_bridge.training.notices import notices

    limit = usable_memory()
    ranks = _ranks(cfg, processes, limit)
    resolved, _ = create_omegaconf_dict_config(cfg)
    stages = estimate_memory(cfg, ranks)
    tokens = cfg.train.global_batch_size * cfg.dataset.seq_length
    flops = _flops(cfg)
    current.show(Syntax(OmegaConf.to_yaml(resolved), "yaml", background_color="default"))
    current.show(
        f"{count_parameters(cfg.model):,} parameters on {ranks} ranks; {tokens:,} tokens and {flops:.3e} FLOPs a step"
    )
    _show_memory(current, stages)
    found = notices(cfg)
    for line in found:
        current.show_line(line)
    worst = max(stages, key=lambda stage: stage.peak)
    on_gpu = cfg.dist.distributed_backend != "gloo"
    fits = worst.peak <= limit
    changes = [] if fits or not on_gpu else _changes(cfg, ranks, limit)
    if on_gpu:
        _show_verdict(current, cfg, ranks, worst.peak, limit, changes)
    return {
        "ok": True,
        "config": OmegaConf.to_container(resolved),
        "parameters": count_parameters(cfg.model),
        "ranks": ranks,
        "tokens_per_step": tokens,
        "flops_per_step": flops,
        "memory_bytes": {**worst.as_dict(), "total": worst.peak},
        "memory_bytes_by_stage": [stage.as_dict() for stage in stages],
        "memory_limit_bytes": limit,
        "fits": fits,
        "changes_that_fit": changes,
        "notices": found,
    }


def _ranks(cfg: Any, processes: int | None, limit: int) -> int:
    import torch

    from falcon_bridge.training.advice import fewest_gpus
    from falcon_bridge.training.run import check_layout, layout_size

    if processes:
        check_layout(cfg, processes)
        return processes
    if cfg.dist.distributed_backend == "gloo":
        return layout_size(cfg)
    return torch.cuda.device_count() or fewest_gpus(cfg, limit) or layout_size(cfg)


def _flops(cfg: Any) -> int:
    from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

    return int(num_floating_point_operations(cfg, batch_size=cfg.train.global_batch_size))


def _show_memory(current: Session, stages: list[Any]) -> None:
    rows = [stage.as_dict() for stage in stages]
    columns = {"stage": [str(index) for index in range(len(rows))]}
    for name in _COMPONENTS:
        columns[name] = [f"{row[name] / _GIB:.2f}" for row in rows]
    order = ["stage", "peak", "activations", "optimizer", "weights", "gradients", "workspace"]
    current.show_table("estimated GiB of a rank, by pipeline stage", columns, order=order, left=set())


def _changes(cfg: Any, ranks: int, limit: int) -> list[dict[str, Any]]:
    from falcon_bridge.training.advice import advice

    return [
        {"overrides": overrides, "ranks": gpus, "peak_bytes": peak}
        for overrides, gpus, peak in advice(cfg, ranks, limit)
    ]


def _show_verdict(
    current: Session, cfg: Any, ranks: int, peak: int, limit: int, changes: list[dict[str, Any]]
) -> None:
    from falcon_bridge.training.memory import RESERVE

    room = f"{limit / _GIB:.0f} GiB ({(limit + RESERVE) / _GIB:.0f} of a GPU less {RESERVE / _GIB:.0f} for CUDA, NCCL)"
    if peak <= limit:
        current.show(f"fits: {peak / _GIB:.1f} GiB of {room} on {ranks} GPUs")
        return
    current.show(f"does not fit: {peak / _GIB:.1f} GiB of {room} on {ranks} GPUs")
    for change in changes:
        gpus = f" on {change['ranks']} GPUs" if change["ranks"] != ranks else ""
        line = f"  {change['peak_bytes'] / _GIB:.1f} GiB{gpus} with {change['overrides'] or 'the same configuration'}"
        current.show_line(line)
    if not changes:
        current.show("  use a larger layout: no single change of recompute, micro-batch or layout is enough")
