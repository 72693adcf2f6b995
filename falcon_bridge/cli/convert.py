"""The verbs ``convert import``, ``convert export`` and ``convert roundtrip``."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from falcon_bridge.cli.session import DebugOption, JsonOption, Session, session
from falcon_bridge.errors import UserError


if TYPE_CHECKING:
    from falcon_bridge.verification.layout import ParallelLayout

_HELP = """Convert checkpoints between Hugging Face and Megatron.

[bold]Examples[/bold]

falcon-bridge convert import tiiuae/Falcon-H1-0.5B-Base ./megatron/falcon-h1-0.5b

falcon-bridge convert export ./megatron/falcon-h1-0.5b ./hf/falcon-h1-0.5b

falcon-bridge convert roundtrip ./my-falcon-h1 --tp 2
"""
convert = typer.Typer(name="convert", help=_HELP, short_help=_HELP.partition("\n")[0], no_args_is_help=True)

HF = Annotated[str, typer.Argument(metavar="HF", help="Hugging Face checkpoint directory, or a hub id.")]
TP = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel size of the conversion.")]
PP = Annotated[int, typer.Option("--pp", min=1, help="Pipeline-parallel size of the conversion.")]
CP = Annotated[int, typer.Option("--cp", min=1, help="Context-parallel size of the conversion (GPU).")]
SequenceParallel = Annotated[bool, typer.Option("--sequence-parallel", help="Sequence parallelism inside TP.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output directory where it exists.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Accept NaN, infinite or absurdly large (> 1e8) weights.")
]


@convert.command("import")
def import_(
    hf: HF,
    megatron_dir: Annotated[Path, typer.Argument(metavar="MEGATRON_DIR", help="Megatron checkpoint to make.")],
    tp: TP = 1,
    pp: PP = 1,
    cp: CP = 1,
    sequence_parallel: SequenceParallel = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a Megatron checkpoint of a Hugging Face one.

    The source is checked first: config, files, names and shapes of all tensors, values, and SHA-256 sums where it has
    them. The result loads under any parallel layout; the layout given here is only that of the conversion.

    [bold]Example[/bold]

    falcon-bridge convert import tiiuae/Falcon-H1-0.5B-Base ./megatron/falcon-h1-0.5b
    """
    with session(json, debug) as current, _bars(current) as progress:
        started = time.monotonic()
        from falcon_bridge.conversion.bitnet_checkpoint import LATENTS_ARE_LOST, weights_form
        from falcon_bridge.conversion.importer import import_checkpoint

        layout = _layout(tp, pp, cp, sequence_parallel)
        source = import_checkpoint(
            hf, megatron_dir, layout, force=force, allow_nonfinite=allow_nonfinite, progress=progress
        )
        result = {
            "ok": True,
            "source": str(source.path),
            "megatron": str(megatron_dir),
            "tensors": len(source.tensors),
            "bytes": source.nbytes,
            "checksums_verified": source.has_checksums,
            "tokenizer": source.has_tokenizer,
            "form": weights_form(source.config, source.tensors),
            "layout": layout.describe(),
            "seconds": round(time.monotonic() - started, 1),
        }
        current.finish(result)
    _say(json, f"imported {result['tensors']} tensors ({source.nbytes / 1e6:.1f} MB) to {megatron_dir}")
    if result["form"] in ("bitnet", "bf16"):
        _say(
            json,
            f"{source.path} {LATENTS_ARE_LOST}",
        )
    if not source.has_checksums:
        _say(json, f"{source.path} has no SHA-256 checksums: nothing to verify the files against")
    if not source.has_tokenizer:
        _say(json, f"{source.path} has no tokenizer: training needs one, see `train --help`")


@convert.command("export")
def export(
    megatron_dir: Annotated[Path, typer.Argument(metavar="MEGATRON_DIR", help="Megatron checkpoint, or an iter_*.")],
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face checkpoint directory to make.")],
    format: Annotated[
        str,
        typer.Option(
            help="hf (as it was imported); for ternary models also bitnet (packed codes), prequantized (latent "
            "weights, to train on) and bf16 (dequantised)."
        ),
    ] = "hf",
    tp: TP = 1,
    pp: PP = 1,
    cp: CP = 1,
    sequence_parallel: SequenceParallel = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a LoRA or DoRA run: the model with its adapters merged into it.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(help="Of a LoRA or DoRA run: the model's checkpoint, if it is not where the run found it."),
    ] = None,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a Hugging Face checkpoint of a Megatron one; stock transformers loads it.

    Of a LoRA or DoRA run it makes the adapter that stock PEFT loads, or with --merge the whole model.

    [bold]Examples[/bold]

    falcon-bridge convert export ./megatron/falcon-h1-0.5b ./hf/falcon-h1-0.5b

    falcon-bridge convert export ./megatron/falcon-edge-1b ./hf/falcon-edge-1b-packed --format bitnet

    falcon-bridge convert export ./nemo_experiments/lora/checkpoints ./hf/merged --merge
    """
    with session(json, debug) as current, _bars(current) as progress:
        started = time.monotonic()
        from falcon_bridge.conversion.adapters import is_adapter_checkpoint
        from falcon_bridge.conversion.atomic import check_target
        from falcon_bridge.conversion.export_format import check_format
        from falcon_bridge.conversion.exporter import export_checkpoint

        layout = _layout(tp, pp, cp, sequence_parallel)
        check_format(format)
        check_target(hf_dir, force=force)
        adapters = is_adapter_checkpoint(megatron_dir)
        if not adapters and (merge or base):
            raise UserError(f"{megatron_dir} has no adapters: --merge and --base are for the checkpoints of PEFT runs")
        if adapters:
            if format != "hf":
                raise UserError(f"--format {format} is for ternary models, which have no adapters: leave it out")
            options = {"base": base, "force": force}
            if merge:
                options |= {"layout": layout, "allow_nonfinite": allow_nonfinite, "progress": progress}
            elif layout.world_size > 1:
                raise UserError("adapters are exported by one process: leave the layout out, or give --merge")
            _export_adapters(megatron_dir, hf_dir, merge, options)
            current.finish(
                {
                    "ok": True,
                    "megatron": str(megatron_dir),
                    "hf": str(hf_dir),
                    "form": "merged" if merge else "adapter",
                    "layout": layout.describe(),
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
            return
        exported = export_checkpoint(
            megatron_dir,
            hf_dir,
            layout,
            format=format,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
        current.finish(
            {
                "ok": True,
                "megatron": str(megatron_dir),
                "iteration": exported.iteration,
                "hf": str(hf_dir),
                "tensors": exported.tensors,
                "bytes": exported.nbytes,
                "config_from": exported.config_from,
                "form": exported.form,
                "layout": layout.describe(),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    _say(json, f"exported {exported.tensors} tensors ({exported.nbytes / 1e6:.1f} MB) to {hf_dir}")


@convert.command("roundtrip")
def roundtrip(
    hf: HF,
    tp: TP = 1,
    pp: PP = 1,
    cp: CP = 1,
    sequence_parallel: SequenceParallel = False,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where to put the two copies; the system's temporary place by default.")
    ] = None,
    allow_nonfinite: AllowNonfinite = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert Hugging Face → Megatron → Hugging Face through files, and compare bit by bit.

    Exit status 1 if any tensor or any field of config.json differs. The copies are removed.

    [bold]Example[/bold]

    falcon-bridge convert roundtrip ./my-falcon-h1 --tp 2
    """
    with session(json, debug) as current, _bars(current) as progress:
        from falcon_bridge.conversion.roundtrip import round_trip

        layout = _layout(tp, pp, cp, sequence_parallel)
        comparison, seconds = round_trip(
            hf, layout, work_dir=work_dir, allow_nonfinite=allow_nonfinite, progress=progress
        )
        current.finish(
            {
                "ok": comparison.ok,
                "params_compared": comparison.params_compared,
                "params_mismatched": len(comparison.mismatched),
                "mismatched": comparison.mismatched,
                "config_differences": comparison.config_differences,
                "layout": layout.describe(),
                "seconds": round(seconds, 1),
            }
        )
        for name in comparison.mismatched[:20]:
            current.show(f"[red]✗[/red] {name} differs")
        for name, (before, after) in comparison.config_differences.items():
            current.show(f"[red]✗[/red] config.json: {name} was {before!r}, is {after!r}")
        same = comparison.params_compared - len(comparison.mismatched)
        current.show(
            f"{same} of {comparison.params_compared} tensors bit-exact, "
            f"{len(comparison.config_differences)} fields of config.json differ"
        )


def _export_adapters(megatron_dir: Path, hf_dir: Path, merge: bool, options: dict[str, Any]) -> None:
    if merge:
        from falcon_bridge.conversion.adapter_merge import export_merged

        export_merged(megatron_dir, hf_dir, **options)
    else:
        from falcon_bridge.conversion.adapter_export import export_adapter

        export_adapter(megatron_dir, hf_dir, **options)


def _layout(tp: int, pp: int, cp: int, sequence_parallel: bool) -> "ParallelLayout":
    from falcon_bridge.verification.layout import ParallelLayout

    return ParallelLayout(tp=tp, pp=pp, cp=cp, sequence_parallel=sequence_parallel)


def _say(json: bool, text: str) -> None:
    typer.echo(text, err=json)


@contextlib.contextmanager
def _bars(current: Session) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage that reports itself; yields what it reports to."""
    with current.progress() as progress:
        first: Any = progress.add_task("preparing", total=1, note="importing Megatron takes up to 30 s")
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            progress.update(first, completed=1, note="")
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note="")
            progress.update(tasks[stage], completed=done, total=total)

        yield update
