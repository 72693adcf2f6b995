"""How fast a training goes, and what share of the device's arithmetic that is."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from falcon_bridge.training.callbacks import StepReport


_PEAKS = (
    # name as the driver gives it, dense bf16 and fp8 FLOP/s; more specific names first. NVIDIA's data sheets
    ("GH200", 989.4e12, 1978.9e12),
    ("H200", 989.4e12, 1978.9e12),
    ("H100 PCIe", 756.5e12, 1513e12),
    ("H100 NVL", 835.5e12, 1671e12),
    ("H100", 989.4e12, 1978.9e12),
    ("H800", 989.4e12, 1978.9e12),
    ("B200", 2250e12, 4500e12),
    ("A100", 312e12, None),
    ("A800", 312e12, None),
)
_RECENT_STEPS = 20


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense FLOP/s that the data sheet of a device promises; None where it is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        precision: "bf16", "fp8" or another, for which there is no figure.
    """
    for name, bf16, fp8 in _PEAKS:
        if name in device_name:
            return {"bf16": bf16, "fp8": fp8}.get(precision)
    return None


def precision_of(cfg: Any) -> str:
    """In what a configuration multiplies: "bf16", "fp8", "fp16" or "fp32"."""
    precision = cfg.model
    if cfg.mixed_precision is not None:
        from megatron.bridge.training.mixed_precision import get_mixed_precision_config

        precision = get_mixed_precision_config(cfg.mixed_precision)
    if precision.fp8:
        return "fp8"
    return "bf16" if precision.bf16 else "fp16" if precision.fp16 else "fp32"


@dataclass(frozen=True)
class Throughput:
    """Speed of some steps.

    Attributes:
        seconds_per_step: the median.
        tokens_per_second: of all ranks.
        flops_per_second: of one rank.
        mfu: share of the device's peak; None where that is not known.
    """

    seconds_per_step: float
    tokens_per_second: float
    flops_per_second: float
    mfu: float | None

    def __str__(self) -> str:
        parts = [f"{self.tokens_per_second:,.0f} tokens/s", f"{self.flops_per_second / 1e12:.3g} TFLOP/s"]
        return "  ".join([*parts, f"MFU {self.mfu:.1%}"] if self.mfu is not None else parts)


def throughput(steps: Sequence[StepReport], ranks: int, peak: float | None) -> Throughput | None:
    """Speed of a run's steps; the first of this process, which compiles kernels, is left out where there are others.

    Args:
        steps: in order.
        ranks: in all.
        peak: FLOP/s of a device.

    Returns:
        None where there is no timed step.
    """
    timed = [step for step in steps if step.seconds > 0]
    timed = [step for step in timed if not step.first] or timed
    if not timed:
        return None
    seconds = sum(step.seconds for step in timed)
    flops = sum(step.flops for step in timed) / seconds / ranks
    return Throughput(
        seconds_per_step=statistics.median(step.seconds for step in timed),
        tokens_per_second=sum(step.tokens for step in timed) / seconds,
        flops_per_second=flops,
        mfu=None if peak is None else flops / peak,
    )


def progress_note(steps: Sequence[StepReport], ranks: int, peak: float | None, train_iters: int) -> str:
    """What a progress bar says beside itself, in two lines: loss, rate and gradient; time left, speed and memory.

    Args:
        steps: so far, in order; the speed is that of the last 20.
        ranks: in all.
        peak: FLOP/s of a device.
        train_iters: the last step.
    """
    last, note = steps[-1], f"loss {steps[-1].loss:.4f}  lr {steps[-1].lr:.2e}"
    if last.grad_norm is not None:
        note += f"  grad norm {last.grad_norm:.3g}"
    if last.skipped:
        note += "  [skipped]"
    speed = throughput(steps[-_RECENT_STEPS:], ranks, peak)
    if speed is None:
        return note
    left = (train_iters - last.iteration) * speed.seconds_per_step
    return f"{note}\nETA {duration(left)}  {speed}  {last.memory / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """``h:mm:ss``, with days where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02}:{seconds:02}"
