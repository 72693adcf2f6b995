"""The verb ``verify``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from falcon_bridge.cli.session import DebugOption, JsonOption, Session, session


if TYPE_CHECKING:
    from falcon_bridge.verification.parity import ParityResult
    from falcon_bridge.verification.verify import VerifyRequest


def verify(
    hf: Annotated[str, typer.Argument(metavar="HF", help="Hugging Face checkpoint directory, or a hub id.")],
    megatron: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Megatron checkpoint to verify instead of a fresh conversion of HF."),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 1,
    vp: Annotated[int, typer.Option(min=1, help="Virtual pipeline stages a pipeline rank.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Context-parallel size (GPU).")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel size.")] = 1,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Sequence parallelism inside tensor parallelism.")
    ] = False,
    first_stage_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the first pipeline stage, for an uneven split.")
    ] = None,
    last_stage_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the last pipeline stage, for an uneven split.")
    ] = None,
    pipeline_layout: Annotated[
        str | None, typer.Option(help="Explicit pipeline stages in Megatron Core's notation, such as 'Et|ttL'.")
    ] = None,
    distributed_optimizer: Annotated[
        bool, typer.Option("--distributed-optimizer", help="Shard gradients over the data-parallel ranks.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, on both sides.")] = "fp32",
    seq_length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows of the global batch.", show_default="the least the layout allows, 2 up")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Pack documents into each row; transformers sees each alone.")
    ] = False,
    train_step: Annotated[
        bool,
        typer.Option("--train-step", help="Also compare all gradients, and the weights after five optimizer steps."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare a checkpoint in Megatron, under a parallel layout, with stock transformers.

    Starts its own ranks: gloo on CPU, NCCL on GPU. Compares logits, loss and the weights after a round trip. Exit
    status 0 if all agree, 1 if something differs, 2 if the layout or the checkpoint cannot be used.

    [bold]Examples[/bold]

    falcon-bridge verify ./my-falcon-h1

    falcon-bridge verify ./my-falcon-h1 --tp 2 --sequence-parallel --train-step

    falcon-bridge verify ./my-falcon-h1 --megatron ./my-megatron-checkpoint --tp 2 --pp 2 --json
    """
    with session(json, debug) as current:
        from falcon_bridge.verification.layout import ParallelLayout
        from falcon_bridge.verification.verify import VerifyRequest

        layout = ParallelLayout(
            tp=tp,
            pp=pp,
            vp=vp,
            cp=cp,
            dp=dp,
            sequence_parallel=sequence_parallel,
            distributed_optimizer=distributed_optimizer,
            first_stage_layers=first_stage_layers,
            last_stage_layers=last_stage_layers,
            pipeline_layout=pipeline_layout,
        )
        result = _run(
            current,
            VerifyRequest(
                hf=hf,
                layout=layout,
                megatron=megatron,
                dtype=dtype,
                seq_length=seq_length,
                batch_size=batch_size,
                packed=packed,
                train_step=train_step,
                seed=seed,
            ),
        )
        _show(current, result, str(layout))
        current.finish(result.to_json())


def _run(current: Session, request: "VerifyRequest") -> "ParityResult":
    from falcon_bridge.verification.verify import STAGES, verify

    with current.progress() as progress:
        task = progress.add_task("verify", total=len(STAGES), note="")
        result = verify(
            request, on_stage=lambda stage: progress.update(task, completed=STAGES.index(stage), note=stage)
        )
        progress.update(task, completed=len(STAGES), note="")
    return result


def _show(current: Session, result: "ParityResult", layout: str) -> None:
    from rich.table import Table

    table = Table(title=f"transformers against Megatron ({layout}, {result.dtype})", show_header=False)
    relative = result.max_abs_logit_diff / result.max_abs_logit if result.max_abs_logit else float("nan")
    table.add_row("max |Δlogit|", f"{result.max_abs_logit_diff:.3g} ({relative:.2g} of max |logit|)")
    table.add_row("cosine of the logits", f"{result.cosine:.9f}")
    table.add_row("same next token", f"{result.next_token_agreement:.2%}")
    table.add_row("loss", f"{result.loss_hf:.7f} in transformers, {result.loss_megatron:.7f} in Megatron")
    if result.max_rel_grad_diff is not None:
        table.add_row("worst relative gradient difference", f"{result.max_rel_grad_diff:.2g}")
    if result.max_rel_weight_diff is not None:
        table.add_row("worst relative weight difference after training", f"{result.max_rel_weight_diff:.2g}")
    table.add_row("tensors bit-exact after the round trip", _exact(result))
    table.add_row("seconds", f"{result.seconds:.1f}")
    current.show(table)
    for finding in result.findings[:20]:
        current.show(f"[red]✗[/red] {finding}")
    if len(result.findings) > 20:
        current.show(f"[red]✗[/red] and {len(result.findings) - 20} more")
    if result.ok:
        current.show("[green]✓[/green] they agree")


def _exact(result: "ParityResult") -> str:
    return f"{result.params_compared - result.params_mismatched} of {result.params_compared}"
