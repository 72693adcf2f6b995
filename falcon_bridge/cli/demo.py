"""The verb ``demo``: the main job at CPU scale."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from falcon_bridge.cli.devices import cpu_only
from falcon_bridge.cli.session import DebugOption, JsonOption, Session, session
from falcon_bridge.errors import UserError


if TYPE_CHECKING:
    from falcon_bridge.demo.result import DemoResult


def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path("falcon-bridge-demo"),
    seed: Annotated[int, typer.Option(help="Of the weights, the data order and the sample.")] = 1234,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory where it exists.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a small Falcon-H1 on real text and prove every step: under four minutes on two CPU cores, no network.

    Trains a tokenizer on the Python language reference, makes a Hugging Face Falcon-H1 with random weights, imports it
    into Megatron, trains it with Megatron Bridge, stops, resumes, exports it, and compares the exported model in stock
    transformers with the Megatron one. Leaves a loss curve, a sample, summary.json and all checkpoints. Exit status 1
    if any check fails. It runs on the CPU also where there is a GPU.

    [bold]Example[/bold]

    falcon-bridge demo --out /tmp/demo
    """
    with cpu_only(), session(json, debug) as current:
        result = _run(current, out, seed, force)
        _show(current, result)
        current.finish(result.to_json())


def _run(current: Session, out: Path, seed: int, force: bool) -> "DemoResult":
    import shutil

    from falcon_bridge.conversion.atomic import check_target
    from falcon_bridge.demo.job import run_demo
    from falcon_bridge.demo.result import DemoSettings

    if not force and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another --out, or replace it with --force")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    if out.is_dir():
        check_target(out, force=True)
        shutil.rmtree(out)
    out.mkdir(parents=True)
    with _bars(current) as progress:
        return run_demo(DemoSettings(out=out.resolve(), seed=seed), progress)


@contextlib.contextmanager
def _bars(current: Session) -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar a stage, all shown from the start."""
    from falcon_bridge.demo.job import STAGES

    with current.progress() as progress:
        tasks = {stage: progress.add_task(stage, total=None, start=False, note="") for stage in STAGES}
        begun = set()

        def update(stage: str, done: int, total: int, note: str) -> None:
            if stage not in begun:
                begun.add(stage)
                progress.start_task(tasks[stage])
            progress.update(tasks[stage], completed=done, total=total, note=note)

        yield update


def _show(current: Session, result: "DemoResult") -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    figures = result.figures
    table = Table(title="falcon-bridge demo", title_justify="left")
    table.add_column("check")
    table.add_column("figures")
    table.add_column("")
    for check in result.checks:
        table.add_row(check.name, check.detail, "[green]✓[/green]" if check.ok else "[red]✗ failed[/red]")
    current.show(table)
    tokens_per_second = figures["train_tokens_seen"] / figures["train_seconds"]
    current.show(
        f"{figures['parameters']:,} parameters, vocabulary {figures['vocab_size']}, "
        f"{tokens_per_second:,.0f} tokens/s of training, {figures['seconds']:.0f} s in all"
    )
    current.show(Panel(Text(result.sample), title="sample", title_align="left"))
    current.show(f"loss curve {figures['loss_curve']}, everything in {figures['out']}")
