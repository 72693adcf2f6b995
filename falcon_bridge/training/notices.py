"""What whoever starts a run should know of its configuration, although nothing about it is wrong."""

from pathlib import Path
from typing import Any

from falcon_bridge.bitnet.callbacks import unfinished_warmup
from falcon_bridge.conversion.bitnet_checkpoint import LATENTS_ARE_LOST, weights_form
from falcon_bridge.conversion.hf_checkpoint import check_checkpoint
from falcon_bridge.conversion.megatron_checkpoint import is_megatron_checkpoint
from falcon_bridge.training.cuda_graph import is_captured
from falcon_bridge.training.document_counts import length_frequencies, room_for_documents


def notices(cfg: Any) -> list[str]:
    """One line each: ternary layers' backend, lost latent weights, captured iterations, schedules that do not end.

    Args:
        cfg: a ``ConfigContainer``, its model finalized.
    """
    return [*_bitnet(cfg), *_graph(cfg), *_schedule(cfg)]


def _bitnet(cfg: Any) -> list[str]:
    model = cfg.model
    if not getattr(model, "use_bitnet", False):
        return []
    backend = model.bitnet_backend
    if backend == "auto":
        backend = "reference" if cfg.dist.distributed_backend == "gloo" else "fused"
    lines = [f"BitNet linears: backend {backend} (model.bitnet_backend={model.bitnet_backend})"]
    if warning := unfinished_warmup(cfg):
        lines.append(warning)
    start = Path(cfg.checkpoint.pretrained_checkpoint) if cfg.checkpoint.pretrained_checkpoint else None
    if start is not None and (start / "config.json").is_file() and not is_megatron_checkpoint(start):
        source = check_checkpoint(start, values=False)
        if weights_form(source.config, source.tensors) in ("bitnet", "bf16"):
            lines.append(f"{start} {LATENTS_ARE_LOST}")
    return lines


def _graph(cfg: Any) -> list[str]:
    if not is_captured(cfg):
        return []
    line = (
        f"CUDA graph: forward and backward of a step are captured after {cfg.model.cuda_graph_warmup_steps} steps "
        "(model.cuda_graph_warmup_steps) and replayed from then on; the norm of the gradient is checked for NaN, the "
        "loss is not"
    )
    if getattr(cfg.dataset, "inter_document_masking", False):
        room = room_for_documents(cfg.train.micro_batch_size, cfg.dataset.seq_length, length_frequencies(cfg))
        line += f"; a micro-batch has room for {room:,} documents, and more end the run"
    return [line]


def _schedule(cfg: Any) -> list[str]:
    last, scheduler = cfg.train.train_iters, cfg.scheduler
    if last is None:
        return []
    lines = []
    if scheduler.lr_decay_iters is not None and last < scheduler.lr_decay_iters:
        lines.append(
            f"the run ends at step {last:,}, before the learning rate has decayed "
            f"(scheduler.lr_decay_iters={scheduler.lr_decay_iters:,}): set it to {last} to decay within the run"
        )
    if scheduler.lr_warmup_iters and scheduler.lr_warmup_iters >= last:
        lines.append(
            f"the learning rate is still warming up when the run ends at step {last:,} "
            f"(scheduler.lr_warmup_iters={scheduler.lr_warmup_iters:,})"
        )
    return lines
