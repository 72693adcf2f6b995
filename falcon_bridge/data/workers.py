"""Parts of a job by several processes, in order, taken up again where an earlier run stopped."""

import contextlib
import ctypes
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from falcon_bridge.data.documents import Converter
from falcon_bridge.data.part import PartReport, read_part, write_part
from falcon_bridge.data.units import Source, Unit
from falcon_bridge.errors import JobError, UserError


Progress = Callable[[str, int, int, str], None]
"""Called with a stage's name, steps done, steps in all and a remark."""


class NoDocument(JobError):
    """The inputs have not one row that can be used."""


_JOB_NAME = "job.json"
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def work_directory(path: Path, job: dict[str, Any], sources: list[Source], *, restart: bool) -> Iterator[Path]:
    """The directory in which a job keeps what it has done, so that it can be taken up again.

    It goes when the block ends well, and also where there is nothing to take up; else it stays for the next run.

    Args:
        path: beside the result.
        job: what determines the result, as JSON: only the same job is taken up again.
        sources: likewise.
        restart: begin anew where another job's is there.

    Raises:
        UserError: another process is at it, or it is of another job.
    """
    identity = json.loads(json.dumps(job | {"sources": [asdict(source) for source in sources]}))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path} cannot be made: a file is in its way; choose another output") from None
    with open(path / "lock", "w") as lock:
        try:
            # a lock of the process, unlike flock's: forked workers do not share it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process is at work in {path}: wait for it, or choose another output") from None
        except OSError:
            pass  # a file system without locks
        known = path / _JOB_NAME
        if known.exists() and _read(known) != identity:
            if not restart:
                raise UserError(
                    f"{path} is an unfinished job with other inputs or options: finish that one, or use --force to "
                    "begin anew"
                )
            for file in path.iterdir():
                if file.name != "lock":
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
        if not known.exists():
            known.with_suffix(".partial").write_text(json.dumps(identity))
            os.replace(known.with_suffix(".partial"), known)
        try:
            yield path
        except BaseException as error:
            if isinstance(error, NoDocument) or not any(path.glob("part-*.json")):
                shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def write_parts(
    work: Path,
    sources: list[Source],
    units: list[Unit],
    converter: Converter,
    *,
    text_lines: bool = False,
    max_bad_rows: int,
    workers: int,
    progress: Progress,
) -> list[PartReport]:
    """Tokenize all units that are not done yet.

    Args:
        work: see `work_directory`.
        sources: of the job.
        units: of these.
        converter: makes documents of rows; forked workers inherit it.
        text_lines: a text file has a document a line.
        max_bad_rows: fail at more than these.
        workers: processes.
        progress: told of every part.

    Returns:
        The reports of all parts, in order.

    Raises:
        JobError: too many bad rows, a damaged file, or a worker died.
    """
    write = partial(
        write_part, work, sources=sources, converter=converter, text_lines=text_lines, max_bad_rows=max_bad_rows
    )
    reports: list[PartReport] = []
    tokens = 0
    for report in _in_order(write, work, units, workers):
        reports.append(report)
        tokens += report.tokens
        bad = sum(len(segment.bad) for part in reports for segment in part.segments) if _bad(report) else None
        if bad is not None and bad > max_bad_rows:
            first = bad_rows(sources, reports)[0]
            raise JobError(
                f"more than {max_bad_rows} bad rows (--max-bad-rows), the first in {first['file']}, line "
                f"{first['line']}: {first['reason']}"
            )
        progress("tokenize", len(reports), len(units), f"{tokens:,} tokens")
    return reports


def bad_rows(sources: list[Source], reports: list[PartReport]) -> list[dict[str, Any]]:
    """The rows left out, each with its file, its line in the whole file (from 1) and the reason.

    Args:
        sources: of the job.
        reports: of the parts from the first on, in order.
    """
    found, before = [], dict.fromkeys(range(len(sources)), 0)
    for report in reports:
        for segment in report.segments:
            found += [
                {"file": sources[segment.source].path, "line": before[segment.source] + line, "reason": reason}
                for line, reason in segment.bad
            ]
            before[segment.source] += segment.lines
    return found


def _bad(report: PartReport) -> bool:
    return not report.kept or any(segment.bad for segment in report.segments)


def _in_order(write: Callable[..., PartReport], work: Path, units: list[Unit], workers: int) -> Iterator[PartReport]:
    """Reports in the order of the units, of parts that are done or done now."""
    done = {number: report for number in range(len(units)) if (report := read_part(work, number)) is not None}
    rest = iter([number for number in range(len(units)) if number not in done])
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("fork"), initializer=_start, initargs=(write,)
    )
    try:
        # a few parts ahead of the one that is waited for
        ahead: deque[tuple[int, Future]] = deque()
        for number in range(len(units)):
            if number in done:
                yield done[number]
                continue
            while len(ahead) < 2 * workers and (following := next(rest, None)) is not None:
                ahead.append((following, pool.submit(_run, following, units[following])))
            yield ahead.popleft()[1].result()
    except BrokenProcessPool:
        raise JobError("a worker was killed, probably out of memory: use fewer --workers") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()


_write: Callable[..., PartReport] | None = None


def _start(write: Callable[..., PartReport]) -> None:
    """In a worker: no outliving the parent, no sharing its Ctrl-C, one thread."""
    global _write
    _write = write
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _run(number: int, unit: Unit) -> PartReport:
    return _write(number, unit=unit)
