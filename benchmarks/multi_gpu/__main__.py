"""Parity, checkpoints and throughput on the GPUs of one machine, over NCCL; tiny and over gloo without GPUs.

    python -m benchmarks.multi_gpu parity checkpoint --ranks 2 --out DIR
    python -m benchmarks.multi_gpu throughput --ranks 2 --out DIR

Each part writes DIR/PART-RANKS.json and .md after every case, so that what a killed run knew is there; tracebacks go
to DIR/log.txt. Status 1 if a case failed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


PARTS = ("parity", "checkpoint", "throughput")
COLUMNS = {
    "parity": ("logits", "logits_of_transformers", "loss", "gradients", "gradients_of_transformers", "weights"),
    "checkpoint": ("tensors", "loss"),
    "throughput": (
        "tokens_per_second",
        "efficiency",
        "step_ms",
        "tflops",
        "communication",
        "communication_exposed",
        "peak_gib",
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4), help="one a GPU")
    parser.add_argument("--out", type=Path, required=True, help="directory of the tables")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    parser.add_argument("--deadline", type=float, default=540, help="seconds after which what is left is given up")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline, failed = time.monotonic() + args.deadline, False
    for part in args.parts:
        rows = run_part(part, args.ranks, args.out, args.only, deadline)
        print(f"## {part}, {args.ranks} ranks\n\n{table(part, rows)}\n", flush=True)
        failed = failed or any(row["ok"] is False for row in rows)
    return 1 if failed else 0


def run_part(part: str, ranks: int, out: Path, only: str, deadline: float) -> list[dict[str, Any]]:
    """Run one part; its rows, which are in `out`, too."""
    import torch

    from benchmarks.multi_gpu import checkpoint, parity, throughput
    from benchmarks.multi_gpu.cases import run_cases
    from falcon_bridge.verification.verify import use_full_precision

    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # forked ranks find it imported
        import falcon_bridge.verification.megatron  # noqa: F401
        from falcon_bridge.conversion.runtime import preload

        preload()
        torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    record, log = _recorder(part, ranks, out, rows), _logger(out)
    # one configuration of each kernel of mamba-ssm, no atomics in them, and fp32 that is fp32
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    exact = {**loopback, "MAMBA_DETERMINISTIC": "1", "TRITON_CACHE_AUTOTUNING": "0"}
    use_full_precision(exact.__setitem__)
    tuned = {**loopback, "MAMBA_DETERMINISTIC": "0", "TRITON_CACHE_AUTOTUNING": "1"}
    with tempfile.TemporaryDirectory(prefix="multi_gpu_") as scratch:
        directory = Path(scratch)
        if part == "parity":
            rounds = [(ranks, parity.cases(ranks, directory, on_gpu=on_gpu), exact)]
        elif part == "checkpoint":
            rounds = [(count, found, exact) for count, found in checkpoint.rounds(ranks, directory)]
        else:
            rounds = [(count, found, tuned | env) for count, found, env in throughput.cases(ranks, on_gpu=on_gpu)]
        for count, found, environment in rounds:
            chosen = [case for case in found if only in case.name]
            if chosen:
                run_cases(
                    chosen,
                    count,
                    environment=environment,
                    deadline=deadline,
                    on_row=record,
                    log=log,
                    # ranks tune kernels at different times
                    **({"collective_seconds": 300.0} if part == "throughput" else {}),
                )
    return rows


def _recorder(part: str, ranks: int, out: Path, rows: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    from benchmarks.multi_gpu.throughput import with_efficiency

    def record(row: dict[str, Any]) -> None:
        rows.append(row)
        if part == "throughput":
            rows[:] = with_efficiency(rows)
        state = "skipped" if row["ok"] is None else "ok" if row["ok"] else "FAILED"
        print(f"{state:8}{row['case']} {row.get('error') or ''}", file=sys.stderr, flush=True)
        about = {"device": _device(), "ranks": ranks, "rows": rows}
        (out / f"{part}-{ranks}.json").write_text(json.dumps(about, indent=1))
        (out / f"{part}-{ranks}.md").write_text(f"{_device()}\n\n{table(part, rows)}\n")

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
    columns = [name for name in (*COLUMNS[part], "code_mismatch") if any(name in row for row in rows)]
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
