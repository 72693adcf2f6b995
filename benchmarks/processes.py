"""One fresh process a case: no case sees memory, caches or an error of the one before.

Importing Megatron Bridge takes longer than most cases, so the next process imports while the last one computes, and
touches the GPU when it is told to.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple


_MARK = "RESULT "


class _Process(NamedTuple):
    process: subprocess.Popen
    out: IO[str]
    errors: IO[str]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def run_each(
    module: str, cases: list[str], *extra: str, timeout: float = 180, deadline: float | None = None, ahead: int = 1
) -> Iterator[dict]:
    """Run ``python -m MODULE --one CASE EXTRA...`` for one case after the other, and yield what each says.

    A case that fails yields its `case` and an `error` of one line, and the next one goes on.

    Args:
        module: of a script whose ``--one`` calls `answer`.
        cases: in order of importance.
        *extra: further arguments.
        timeout: seconds that a case may take.
        deadline: `time.monotonic()` after which none starts, and a running one ends; such cases have an error.
        ahead: how many processes import while one computes.
    """
    waiting: list[_Process] = []
    try:
        for index, case in enumerate(cases):
            while len(waiting) <= ahead and index + len(waiting) < len(cases):
                waiting.append(_start(module, cases[index + len(waiting)], extra))
            yield _result(waiting.pop(0), case, timeout, deadline)
    finally:
        for started in waiting:
            started.end()


def _start(module: str, case: str, extra: tuple[str, ...]) -> _Process:
    # files, since a pipe that nobody reads yet would stop an import that warns a lot
    out, errors = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
    command = [sys.executable, "-m", module, "--one", case, *extra]
    return _Process(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=errors, text=True), out, errors
    )


def _result(started: _Process, case: str, timeout: float, deadline: float | None) -> dict:
    left = timeout if deadline is None else min(timeout, deadline - time.monotonic())
    if left <= 0:
        started.end()
        return {"case": case, "error": "not run: the deadline has passed"}
    try:
        started.process.communicate("go\n", timeout=left)
    except subprocess.TimeoutExpired:
        started.end()
        return {"case": case, "error": f"not done after {left:.0f} s"}
    out, errors = (_text(file) for file in (started.out, started.errors))
    for line in reversed(out):
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    last = (errors or out or ["no output"])[-1]
    return {"case": case, "error": f"exit status {started.process.returncode}: {last}"}


def _text(file: IO[str]) -> list[str]:
    file.seek(0)
    return [line for line in file.read().splitlines() if line.strip()]


def answer(case: str, run: Callable[[str, dict], None], out_of_memory: type[Exception]) -> None:
    """Within a process of `run_each`: wait for the word, call ``run(case, figures)``, print the figures.

    Out of memory is a result as well: what `run` had found so far, and an `error`.

    Args:
        case: from the command line.
        run: puts what it finds into the dictionary that it is given.
        out_of_memory: ``torch.OutOfMemoryError``.
    """
    if sys.stdin.readline().strip() != "go":
        raise SystemExit(f"--one {case} is for processes that this script starts: use --case")
    figures: dict = {"case": case}
    try:
        run(case, figures)
    except out_of_memory as error:
        figures["error"] = f"out of memory: {str(error).splitlines()[0]}"
    print(_MARK + json.dumps(figures), flush=True)


def write_json(path: Path | None, results: list[dict]) -> None:
    """Write all results so far; does nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1))
