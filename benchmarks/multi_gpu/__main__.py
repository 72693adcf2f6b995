"""Parity, checkpoints and throughput on the GPUs of one machine, over NCCL; tiny and over gloo without GPUs.

    python -m benchmarks.multi_gpu parity checkpoint throughput --ranks 2 --out DIR
    python -m benchmarks.multi_gpu parity --ranks 2 --out DIR --only CP2 --only BitNet

Ranks are started twice, for what must be exact and for what must be fast. Each part writes DIR/PART-RANKS.json and .md
after every case, so that what a killed run knew is there; tracebacks go to DIR/log.txt. Status 1 if a case failed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any


PARTS = ("parity", "checkpoint", "throughput")
COLUMNS = {
    "parity": (
        "logits",
        "logits_of_transformers",
        "loss",
        "gradients",
        "gradients_of_transformers",
        "weights",
        "code_mismatch",
        "gathered",
        "gathered_in_all",
    ),
    "checkpoint": ("tensors", "loss"),
    "throughput": (
        "tokens_per_second",
        "efficiency",
        "step_ms",
        "tflops",
        "communication",
        "communication_exposed",
        "idle",
        "peak_gib",
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4), help="one a GPU")
    parser.add_argument("--out", type=Path, required=True, help="directory of the tables")
    parser.add_argument(
        "--only", action="append", default=[], help="run only cases whose name contains this; repeatable"
    )
    parser.add_argument("--skip", action="append", default=[], help="and none whose name contains this; repeatable")
    parser.add_argument(
        "--skip-shown",
        type=Path,
        action="append",
        default=[],
        help="nor those that a table of this Markdown file shows as ok",
    )
    parser.add_argument("--deadline", type=float, default=540, help="seconds after which what is left is given up")
    parser.add_argument(
        "--no-tuning", action="store_true", help="throughput with the first configuration of each kernel"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.deadline
    shown = {name for file in args.skip_shown for name in shown_as_ok(file.read_text(), args.ranks)}

    def wanted(name: str) -> bool:
        return (
            (not args.only or any(text in name for text in args.only))
            and not any(text in name for text in args.skip)
            and name not in shown
        )

    rows = run_parts(args.parts, args.ranks, args.out, wanted, deadline, tuned=not args.no_tuning)
    for part in args.parts:
        print(f"## {part}, {args.ranks} ranks\n\n{table(part, rows[part])}\n", flush=True)
    return 1 if any(row["ok"] is False for found in rows.values() for row in found) else 0


def run_parts(
    parts: list[str], ranks: int, out: Path, wanted: Callable[[str], bool], deadline: float, *, tuned: bool
) -> dict[str, list[dict[str, Any]]]:
    """Run parts; the rows of each, which are in `out`, too."""
    import torch

    from benchmarks.multi_gpu import checkpoint, parity, throughput
    from benchmarks.multi_gpu.cases import COLLECTIVE_SECONDS, run_cases
    from falcon_bridge.verification.verify import use_full_precision

    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # forked ranks find it imported
        import falcon_bridge.verification.megatron  # noqa: F401
        from falcon_bridge.conversion.runtime import preload

        preload()
        torch.set_num_threads(1)
    # one configuration of each kernel of mamba-ssm, no atomics in them, and fp32 that is fp32
    untuned = {"MAMBA_DETERMINISTIC": "1", "TRITON_CACHE_AUTOTUNING": "0"}
    exact = dict(untuned)
    use_full_precision(exact.__setitem__)
    fast = {"MAMBA_DETERMINISTIC": "0", "TRITON_CACHE_AUTOTUNING": "1"} if tuned else untuned
    # one hardware queue keeps the gathers of tensor parallelism in the order in which they overlap with products
    fast = {**fast, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    with tempfile.TemporaryDirectory(prefix="multi_gpu_") as scratch:
        makers = {
            "parity": lambda: parity.cases(ranks, Path(scratch), on_gpu=on_gpu),
            "checkpoint": lambda: checkpoint.cases(ranks, Path(scratch)),
            "throughput": lambda: throughput.cases(ranks, on_gpu=on_gpu),
        }
        # ranks that tune kernels do so at different times
        for together, environment, seconds in (
            (PARTS[:2], exact, COLLECTIVE_SECONDS),
            (PARTS[2:], fast, 2 * COLLECTIVE_SECONDS),
        ):
            found = [replace(case, part=part) for part in together if part in parts for case in makers[part]()]
            chosen = [case for case in found if wanted(case.name)]
            if chosen:
                run_cases(
                    chosen,
                    ranks,
                    environment={"GLOO_SOCKET_IFNAME": "lo", **environment},
                    deadline=deadline,
                    on_row=_recorder(ranks, out, rows),
                    log=_logger(out),
                    collective_seconds=seconds,
                )
    return rows


def shown_as_ok(text: str, ranks: int) -> set[str]:
    """First cells of the rows of Markdown tables, as `table` writes them, that end in ok."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]
    return {row[0] for row in rows if len(row) > 2 and row[1] in (str(ranks), "1") and row[-1] == "ok"}


def _recorder(ranks: int, out: Path, rows: dict[str, list[dict[str, Any]]]) -> Callable[[Any, dict[str, Any]], None]:
    from benchmarks.multi_gpu.throughput import with_efficiency

    def record(case: Any, row: dict[str, Any]) -> None:
        part, own = case.part, rows[case.part]
        own.append(row)
        own[:] = with_efficiency(own)
        state = "skipped" if row["ok"] is None else "ok" if row["ok"] else "FAILED"
        print(
            f"{state:8}{row['case']} ({row.get('seconds', 0)} s) {row.get('error') or ''}", file=sys.stderr, flush=True
        )
        about = {"device": _device(), "ranks": ranks, "rows": own}
        (out / f"{part}-{ranks}.json").write_text(json.dumps(about, indent=1))
        (out / f"{part}-{ranks}.md").write_text(f"{_device()}\n\n{table(part, own)}\n")

    return record


def _logger(out: Path) -> Callable[[str], None]:
    def log(text: str) -> None:
        with open(out / "log.txt", "a") as file:
            file.write(text.rstrip() + "\n\n")

    return log


def _device() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, gloo"
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def table(part: str, rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; a column only where some row has it."""
    columns = [name for name in COLUMNS[part] if any(name in row for row in rows)]
    lines = [
        "| case | ranks | " + "".join(f"{name.replace('_', ' ')} | " for name in columns) + "seconds | result |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for row in rows:
        cells = [_cell(row.get(name)) for name in columns]
        result = "skipped" if row["ok"] is None else "ok" if row["ok"] else "**failed**"
        result += f": {row['error']}" if row.get("error") else ""
        cells += [str(row.get("seconds", "")), result.replace("|", "\\|")]
        lines.append(f"| {row['case']} | {row['world']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return (
        "" if value is None else f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())
