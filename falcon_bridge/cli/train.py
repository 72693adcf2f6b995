"""The verb ``train``: a recipe here and now."""

import contextlib
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from falcon_bridge.cli.devices import cpu_only
from falcon_bridge.cli.run_options import (
    DatasetOption,
    HFPathOption,
    Overrides,
    PeftSchemeOption,
    RecipeOption,
    UseBitnetOption,
)
from falcon_bridge.cli.session import DebugOption, JsonOption, Session, session
from falcon_bridge.errors import JobError, one_line
from falcon_bridge.ranks import launched_as_rank


_SECONDS_BETWEEN_LINES = 10.0


def train(
    recipe: RecipeOption,
    overrides: Overrides = None,
    dataset: DatasetOption = None,
    hf_path: HFPathOption = None,
    use_bitnet: UseBitnetOption = False,
    peft_scheme: PeftSchemeOption = None,
    processes: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Ranks to start; all GPUs, or on CPU what the layout takes.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved configuration, memory and FLOPs; train nothing.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a recipe on this machine with Megatron Bridge; resumes where its checkpoint directory has a run.

    Starts its own ranks (gloo on CPU, NCCL on GPU), or is one rank where torchrun started it. Without --dataset it
    pretrains on mock data. Leaves report.md, a plot and TensorBoard's files beside the checkpoints.

    [bold]Examples[/bold]

    falcon-bridge train --recipe falcon_h1_tiny_cpu_pretrain_config train.train_iters=20

    falcon-bridge train --recipe falcon_h1_500m_pretrain_config --hf-path ./falcon-h1-0.5b --dataset ./data/web:0.7
    --dataset ./data/code:0.3

    falcon-bridge train --recipe falcon_h1_500m_sft_config --hf-path ./falcon-h1-0.5b --dataset ./data/chats

    falcon-bridge train --recipe falcon_h1_7b_pretrain_config --dry-run model.tensor_model_parallel_size=4
    """
    # a recipe for the CPU is one also where there is a GPU
    devices = cpu_only() if "cpu" in recipe.split("_") else contextlib.nullcontext()
    with devices, session(json, debug, keep_logs=launched_as_rank()) as current:
        with current.status("importing Megatron, up to 30 s"):
            from falcon_bridge.training.run import configure

            cfg = configure(recipe, overrides or [], dataset, hf_path, use_bitnet=use_bitnet, peft_scheme=peft_scheme)
        if dry_run:
            from falcon_bridge.cli.dry_run import dry_run as show

            current.finish(show(current, cfg, processes))
            return
        given = {"--hf-path": hf_path, "--peft-scheme": peft_scheme, "--nproc": processes}
        command = ["train", "--recipe", recipe]
        command += [text for option, value in given.items() if value for text in (option, str(value))]
        command += [text for path in dataset or [] for text in ("--dataset", path)]
        command += [*(["--use-bitnet"] if use_bitnet else []), *(overrides or [])]
        result = _train(current, cfg, recipe, command, processes)
        if _first_rank():
            current.finish(result)


def _first_rank() -> bool:
    """Whether this process speaks for all ranks."""
    return not launched_as_rank() or os.environ["RANK"] == "0"


def _train(current: Session, cfg: Any, recipe: str, command: list[str], processes: int | None) -> dict[str, Any]:
    from falcon_bridge.training.notices import notices
    from falcon_bridge.training.record import TrainingRecord
    from falcon_bridge.training.report import Run, device_name, write_report
    from falcon_bridge.training.run import check_start, world_size

    check_start(cfg)
    if _first_rank():
        for line in notices(cfg):
            current.show_line(line)
    ranks = int(os.environ["WORLD_SIZE"]) if launched_as_rank() else world_size(cfg, processes)
    run, record = Run(recipe, command, cfg, ranks, device_name(cfg)), TrainingRecord()
    started = time.monotonic()
    try:
        _run(current, run, record)
        if record.steps and record.steps[-1].loss != record.steps[-1].loss:
            raise JobError(f"the loss is not a number at step {record.steps[-1].iteration}: lower optimizer.lr")
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed ({one_line(error)})"
        if _first_rank():
            with contextlib.suppress(OSError):  # the first error is the one to tell
                write_report(run, record, time.monotonic() - started, status)
        raise
    if not _first_rank():
        return {}
    seconds = time.monotonic() - started
    return _result(current, run, record, seconds, write_report(run, record, seconds, "finished"))


def _run(current: Session, run: Any, record: Any) -> None:
    from falcon_bridge.training.run import run_pretrain
    from falcon_bridge.training.throughput import progress_note

    train_iters, shown = run.cfg.train.train_iters, time.monotonic()
    bar = contextlib.nullcontext() if launched_as_rank() else current.progress()
    with bar as progress:
        task = progress and progress.add_task("train", total=train_iters, note="setting up")

        def on_event(rank: int, event: Any) -> None:
            nonlocal shown
            if not record.add(event):
                return
            note = progress_note(record.steps, run.ranks, run.peak_flops, train_iters)
            if progress is not None:
                progress.update(task, completed=event.iteration, note=note)
            # a log file has no bar
            last, due = event.iteration == train_iters, time.monotonic() - shown >= _SECONDS_BETWEEN_LINES
            if not current.console.is_terminal and (last or due):
                shown = time.monotonic()
                line = f"step {event.iteration:,} of {train_iters:,}: {note.replace(chr(10), '  ')}"
                current.console.print(line, soft_wrap=True, highlight=False)

        run_pretrain(run.cfg, run.ranks, on_event=on_event)


def _result(current: Session, run: Any, record: Any, seconds: float, report: Path | None) -> dict[str, Any]:
    from falcon_bridge.training.throughput import throughput

    cfg, steps = run.cfg, record.steps
    saved = f"; checkpoints in {cfg.checkpoint.save}" if cfg.checkpoint.save else ""
    if steps:
        current.show(
            f"steps {steps[0].iteration} to {steps[-1].iteration}: loss {steps[0].loss:.4f} → {steps[-1].loss:.4f} "
            f"in {seconds:.1f} s{saved}"
        )
    elif launched_as_rank():
        current.show(f"no step to report: done before, or stopped without a checkpoint{saved}")
    else:
        current.show(f"nothing to do: {cfg.checkpoint.load} has {cfg.train.train_iters} steps already")
    if report is not None:
        current.show(f"report: {report}")
    speed = throughput(steps, run.ranks, run.peak_flops)
    return {
        "ok": True,
        "first_step": steps[0].iteration if steps else None,
        "last_step": steps[-1].iteration if steps else None,
        "losses": [step.loss for step in steps],
        "evaluations": [{"step": e.iteration, "loss": e.loss} for e in record.evaluations],
        "checkpoint": cfg.checkpoint.save,
        "report": None if report is None else str(report),
        "tokens_per_second": speed and speed.tokens_per_second,
        "flops_per_second_per_rank": speed and speed.flops_per_second,
        "mfu": speed and speed.mfu,
        "peak_memory_bytes": record.memory,
        "seconds": round(seconds, 1),
    }
