"""The page that a training leaves in its directory: what was run, on what, how it went, where the checkpoint is."""

import platform
import shlex
import statistics
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from falcon_bridge.training.callbacks import EvalReport, StepReport
from falcon_bridge.training.loggers import active_loggers
from falcon_bridge.training.notices import notices
from falcon_bridge.training.parameters import count_parameters
from falcon_bridge.training.plot import plot_training
from falcon_bridge.training.record import TrainingRecord, run_directory, write_whole
from falcon_bridge.training.throughput import duration, peak_flops, precision_of, throughput


REPORT_NAME, PLOT_NAME = "report.md", "training.png"
_PACKAGES = (
    "falcon-bridge",
    "megatron-bridge",
    "megatron-core",
    "torch",
    "transformers",
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
)
_FINAL_STEPS = 10


@dataclass(frozen=True)
class Run:
    """A training, as a report names it.

    Attributes:
        recipe: its name.
        command: the arguments of ``falcon-bridge`` that run it, or run on with it.
        cfg: its ``ConfigContainer``.
        ranks: in all.
        device: name of the device of a rank.
    """

    recipe: str
    command: list[str]
    cfg: Any
    ranks: int
    device: str

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s that the device's data sheet promises for the run's precision, where known."""
        return peak_flops(self.device, precision_of(self.cfg))


def device_name(cfg: Any) -> str:
    """Name of the device that `cfg` trains on."""
    import torch

    if torch.cuda.is_available() and cfg.dist.distributed_backend != "gloo":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.processor() or platform.machine()})"


def write_report(run: Run, record: TrainingRecord, seconds: float, status: str) -> Path | None:
    """Write ``report.md``, ``training.png`` and ``steps.jsonl`` into the run's directory.

    A resumed run's report covers the steps before it, too.

    Args:
        run: what was trained.
        record: what its ranks reported.
        seconds: that this process took, set-up included.
        status: one line: finished, interrupted, or how it failed.

    Returns:
        The report; None where there is no step to report, or no directory to write to.
    """
    directory = run_directory(run.cfg)
    if directory is None or not record.steps:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    steps, evaluations = record.write(directory)
    write_whole(directory / PLOT_NAME, plot_training(run.recipe, steps, evaluations))
    page = _page(run, record, steps, evaluations, seconds, status)
    write_whole(directory / REPORT_NAME, page.encode())
    return directory / REPORT_NAME


def _page(
    run: Run,
    record: TrainingRecord,
    steps: list[StepReport],
    evaluations: list[EvalReport],
    seconds: float,
    status: str,
) -> str:
    return "\n".join(
        [
            f"# {run.recipe}",
            "",
            f"{status[0].upper()}{status[1:]}, at step {steps[-1].iteration:,} of {run.cfg.train.train_iters:,}.",
            "",
            f"![loss and tokens a second over the steps]({PLOT_NAME})",
            "",
            *_table("Result", _results(run, record, steps, evaluations, seconds)),
            *_table("Run", _setup(run)),
            *_notices(run),
            *_checkpoint(run),
        ]
    )


def _table(title: str, rows: dict[str, str]) -> list[str]:
    lines = [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *lines, ""]


def _results(
    run: Run, record: TrainingRecord, steps: list[StepReport], evaluations: list[EvalReport], seconds: float
) -> dict[str, str]:
    own, last = record.steps, steps[-max(1, min(_FINAL_STEPS, len(steps) // 10)) :]
    rows = {
        "loss": f"{steps[0].loss:.4f} at step {steps[0].iteration} → {statistics.fmean(s.loss for s in last):.4f} "
        + (f"(mean of the last {len(last)} steps)" if len(last) > 1 else f"at step {steps[-1].iteration}"),
    }
    if evaluations:
        best = min(evaluations, key=lambda evaluation: evaluation.loss)
        rows["validation loss"] = (
            f"{evaluations[-1].loss:.4f} at step {evaluations[-1].iteration}; lowest {best.loss:.4f} at step "
            f"{best.iteration}"
        )
    rows["tokens"] = f"{sum(step.tokens for step in steps):,} in {len(steps):,} steps"
    skipped = sum(step.skipped for step in steps)
    if skipped:
        rows["skipped steps"] = f"{skipped} (non-finite gradients)"
    speed = throughput(own, run.ranks, run.peak_flops)
    if speed is not None:
        share = "" if speed.mfu is None else f", MFU {speed.mfu:.1%} of {run.peak_flops / 1e12:,.0f}"
        rows["throughput"] = (
            f"{speed.tokens_per_second:,.0f} tokens/s; {speed.flops_per_second / 1e12:.3g} TFLOP/s a rank{share}; "
            f"{speed.seconds_per_step:.3g} s a step"
        )
    rows["peak memory of a rank"] = f"{record.memory / 2**30:.2f} GiB"
    rows["time"] = f"{duration(seconds)} for steps {own[0].iteration:,} to {own[-1].iteration:,}, set-up included"
    return rows


def _setup(run: Run) -> dict[str, str]:
    cfg, model = run.cfg, run.cfg.model
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size or 1
    layout = f"TP {tp}, PP {pp}, CP {cp}, DP {run.ranks // (tp * pp * cp)} on {run.ranks} rank{'s' * (run.ranks > 1)}"
    rows = {
        "command": f"`falcon-bridge {shlex.join(run.command)}`",
        "model": f"{type(model).__name__}: {model.num_layers} layers of width {model.hidden_size}, "
        f"{count_parameters(model):,} parameters, {precision_of(cfg)}" + _adapters(cfg),
        "layout": layout + (", sequence parallel" if model.sequence_parallel else ""),
        "batch": f"{cfg.train.global_batch_size} rows of {model.seq_length:,} tokens, "
        f"{cfg.train.micro_batch_size} at a time",
        "data": _data(cfg),
    }
    if cfg.checkpoint.pretrained_checkpoint:
        rows["started from"] = f"`{cfg.checkpoint.pretrained_checkpoint}`"
    rows["device"] = f"{run.device}, Python {platform.python_version()}"
    rows["packages"] = ", ".join(_versions())
    loggers = active_loggers(cfg)
    if loggers:
        rows["logged to"] = ", ".join(loggers)
    return rows


def _notices(run: Run) -> list[str]:
    found = notices(run.cfg)
    return ["## Notes", "", *(f"- {line}" for line in found), ""] if found else []


def _adapters(cfg: Any) -> str:
    if cfg.peft is None:
        return ""
    return f"; {type(cfg.peft).__name__} of rank {cfg.peft.dim} on {', '.join(cfg.peft.target_modules)}"


def _data(cfg: Any) -> str:
    if getattr(cfg.dataset, "dataset_root", None):
        return f"`{cfg.dataset.dataset_root}`"
    blend = getattr(cfg.dataset, "blend", None)
    if blend is None:
        return "mock data" if hasattr(cfg.dataset, "blend") else type(cfg.dataset).__name__
    prefixes, weights = blend
    shares = [f" ({weight})" for weight in weights] if weights else [""] * len(prefixes)
    return ", ".join(f"`{prefix}`{share}" for prefix, share in zip(prefixes, shares, strict=True))


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def _checkpoint(run: Run) -> list[str]:
    save = run.cfg.checkpoint.save
    tracker = Path(save) / "latest_checkpointed_iteration.txt" if save else None
    if tracker is None or not tracker.is_file():
        return ["## Checkpoint", "", "None was written.", ""]
    lines = [
        "## Checkpoint",
        "",
        f"`{save}`, step {tracker.read_text().strip()}. The same command runs on from there (with a larger "
        "`train.train_iters` once it is done).",
        "",
    ]
    export = ["falcon-bridge", "convert", "export", str(save)]
    if run.cfg.peft is not None:
        exports = {"The adapters, for PEFT": ["ADAPTER_DIR"], "Merged into the model": ["HF_DIR", "--merge"]}
    elif getattr(run.cfg.model, "use_bitnet", False):
        exports = {"To Hugging Face": ["HF_DIR"], "Packed": ["HF_DIR", "--format", "bitnet"]}
    else:
        exports = {"To Hugging Face": ["HF_DIR"]}
    for what, rest in exports.items():
        lines += [f"{what}:", "", "```", shlex.join([*export, *rest]), "```", ""]
    return lines
