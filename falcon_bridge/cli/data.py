"""The verbs ``data prepare`` and ``data prepare-chat``."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from falcon_bridge.cli.session import DebugOption, JsonOption, Session, session


if TYPE_CHECKING:
    from falcon_bridge.data.info import DatasetInfo

_HELP = """Make training data: indexed datasets of text, packed data of conversations.

[bold]Examples[/bold]

falcon-bridge data prepare ./corpus/*.jsonl.gz --tokenizer ./falcon-h1-0.5b --out ./data/corpus

falcon-bridge data prepare-chat chat.jsonl --tokenizer ./falcon-h1-0.5b-instruct --out ./data/chat --seq-length 4096
"""
_SHOWN = 20
"""Bad rows listed on stderr; the JSON file has all."""

data = typer.Typer(name="data", help=_HELP, short_help=_HELP.partition("\n")[0], no_args_is_help=True)

Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="INPUT...",
        help="JSON Lines (plain or .gz), Parquet or text files, directories of them, or saved Hugging Face datasets.",
    ),
]
Tokenizer = Annotated[
    str, typer.Option(metavar="HF", help="Hugging Face directory with a fast tokenizer, or a hub id.")
]
Split = Annotated[str | None, typer.Option(help="Split to take of a dataset that has several.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")]
MaxBadRows = Annotated[
    int, typer.Option(min=0, help="Rows that cannot be used are left out and listed; fail at more than these.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output, or an unfinished job with other inputs.")]


@data.command("prepare")
def prepare(
    inputs: Inputs,
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(metavar="PREFIX", help="Makes PREFIX.bin, PREFIX.idx and PREFIX.json.")],
    text_key: Annotated[str, typer.Option(help="Where JSON Lines, Parquet and datasets have their text.")] = "text",
    text_lines: Annotated[
        bool, typer.Option("--text-lines", help="A .txt or .md file has a document a line; else it is one.")
    ] = False,
    bos: Annotated[bool, typer.Option("--bos", help="Begin each document with the tokenizer's bos_token.")] = False,
    split: Split = None,
    workers: Workers = None,
    max_bad_rows: MaxBadRows = 1000,
    force: Force = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tokenize text into Megatron's indexed dataset (.bin and .idx), for `train --dataset PREFIX`.

    Each document ends with the tokenizer's eos_token; their order is that of the inputs. Rows that cannot be used are
    left out, and listed with file and line in PREFIX.json. Stopped in the middle, the same command goes on where it
    was; the result has the same bytes.

    [bold]Examples[/bold]

    falcon-bridge data prepare ./corpus/*.jsonl.gz --tokenizer ./falcon-h1-0.5b --out ./data/corpus

    falcon-bridge data prepare ./wikitext --split train --tokenizer ./falcon-h1-0.5b --out ./data/wikitext
    """
    with session(json, debug) as current, _bars(current) as progress:
        started = time.monotonic()
        from falcon_bridge.data.prepare import prepare_text

        info = prepare_text(
            inputs,
            tokenizer,
            out,
            text_key=text_key,
            text_lines=text_lines,
            split=split,
            bos=bos,
            workers=workers,
            max_bad_rows=max_bad_rows,
            force=force,
            progress=progress,
        )
        prefix = out.with_suffix("") if out.suffix in (".bin", ".idx") else out
        _finish(current, info, str(prefix), f"{prefix}.json", started)


@data.command("prepare-chat")
def prepare_chat(
    inputs: Inputs,
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to make.")],
    seq_length: Annotated[int, typer.Option(min=2, help="Tokens of a row, into which conversations are packed.")],
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer conversations, instead of leaving them out as bad rows.")
    ] = False,
    validation_share: Annotated[float, typer.Option(help="Share of the conversations to hold out.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the order in which conversations fill rows.")] = 1234,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel size to pad for.")] = 1,
    cp: Annotated[int, typer.Option("--cp", min=1, help="Context-parallel size to pad for.")] = 1,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Pad for sequence parallelism inside TP.")
    ] = False,
    split: Split = None,
    workers: Workers = None,
    max_bad_rows: MaxBadRows = 1000,
    force: Force = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Pack conversations for fine-tuning, with the tokenizer's chat template and the loss on answers only.

    Rows have "messages" with "role" and "content", or "conversations" with "from" and "value". The answers are what
    the template marks with {% generation %}; without marks, what it puts behind its generation prompt. Rows that
    cannot be used are left out, and listed with file and line in DIR/dataset.json.

    [bold]Example[/bold]

    falcon-bridge data prepare-chat chat.jsonl --tokenizer ./falcon-h1-0.5b-instruct --out ./chat --seq-length 4096
    """
    with session(json, debug) as current, _bars(current) as progress:
        started = time.monotonic()
        from falcon_bridge.data.info import SFT_INFO_NAME
        from falcon_bridge.data.prepare_chat import prepare_chat as prepare
        from falcon_bridge.training.sft_dataset import pad_multiple

        info = prepare(
            inputs,
            tokenizer,
            out,
            seq_length=seq_length,
            pad_multiple=pad_multiple(tp, cp, sequence_parallel),
            truncate=truncate,
            validation_share=validation_share,
            seed=seed,
            split=split,
            workers=workers,
            max_bad_rows=max_bad_rows,
            force=force,
            progress=progress,
        )
        _finish(current, info, str(out), str(out / SFT_INFO_NAME), started)


def _finish(current: Session, info: "DatasetInfo", out: str, report: str, started: float) -> None:
    """Say what was made, and which rows were left out."""
    bad = info.bad_rows
    for row in bad[:_SHOWN]:
        current.console.print(f"{row['file']}:{row['line']}: {row['reason']}", markup=False, soft_wrap=True)
    if bad:
        more = f", {_SHOWN} of them above" if len(bad) > _SHOWN else ""
        current.console.print(f"{len(bad)} bad rows were left out{more}; all are in {report}", markup=False)
    what = "conversations" if info.kind == "chat" else "documents"
    current.show(f"{info.documents:,} {what}, {info.tokens:,} tokens: {out}")
    for name, figures in info.extra.items():
        if isinstance(figures, dict):
            current.show(
                f"{name}: {figures['rows']:,} rows of {info.seq_length} tokens, {figures['filled']:.1%} filled, "
                f"{figures['targets']:,} targets"
            )
            if figures["targets_after_eos"]:
                current.show(
                    f"{name}: {figures['targets_after_eos']:,} further targets come right behind the eos_token, and "
                    "Megatron Bridge leaves these out of the loss"
                )
    current.finish(
        {
            "ok": True,
            "out": out,
            "report": report,
            "documents": info.documents,
            "tokens": info.tokens,
            "max_token_id": info.max_token_id,
            "vocab_size": info.vocab_size,
            "bad_rows": len(bad),
            "first_bad_rows": bad[:_SHOWN],
            "blank_lines": sum(counts["blank_lines"] for counts in info.inputs),
            **({"seq_length": info.seq_length, "pad_multiple": info.pad_multiple} if info.seq_length else {}),
            **info.extra,
            "seconds": round(time.monotonic() - started, 1),
        }
    )


@contextlib.contextmanager
def _bars(current: Session) -> Iterator[Callable[[str, int, int, str], Any]]:
    """A progress bar for each stage that reports."""
    with current.progress() as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note="")
            progress.update(tasks[stage], completed=done, total=total, note=note)

        yield report
