"""What a verb shows, and where: results on stdout, progress and errors on stderr, the libraries' chatter aside."""

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from rich.progress import Progress

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout as the last thing; all else goes to stderr.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the libraries' logs.")]


class Session:
    """One run of a verb.

    Attributes:
        console: rich console on stderr, for progress and remarks.
        json: whether stdout is for the JSON object alone.
    """

    def __init__(self, json: bool, stdout: IO[str], stderr: IO[str]) -> None:
        from rich.console import Console

        self.json = json
        self.console = Console(file=stderr)
        self._results = Console(file=stderr if json else stdout)
        self.result: dict[str, Any] | None = None

    def show(self, *renderables: Any) -> None:
        """Print results for people: on stdout, or on stderr with ``--json``."""
        self._results.print(*renderables)

    def show_line(self, text: str) -> None:
        """Print a line as it is, however long, for people to copy: no markup, no line breaks."""
        self._results.print(text, markup=False, highlight=False, soft_wrap=True)

    def show_table(self, title: str, columns: dict[str, list[str]], *, order: list[str], left: set[str]) -> None:
        """Print a table for people, every cell whole; see `tables.fitted_table`.

        A terminal gets the columns that fit, a pipe or a file all of them.
        """
        from falcon_bridge.cli.tables import fitted_table

        terminal = self._results.is_terminal
        table, hidden = fitted_table(
            title, columns, order=order, left=left, width=self._results.width if terminal else None
        )
        if not terminal:
            unlimited = self._results.options.update(width=10_000)
            self._results.width = max(self._results.width, self._results.measure(table, options=unlimited).maximum)
        self._results.print(table)
        if hidden:
            self._results.print(f"not shown for lack of width: {', '.join(hidden)} (--json has them)", soft_wrap=True)

    @contextlib.contextmanager
    def progress(self) -> Iterator["Progress"]:
        """A progress bar on stderr; finished bars stay, those of a failed job go, so that its error stands alone."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        whole, rest = {"no_wrap": True, "min_width": 7}, Column(no_wrap=True, overflow="ellipsis", ratio=1)
        progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(**whole)),
            TimeElapsedColumn(table_column=Column(**whole)),
            TextColumn("{task.fields[note]}", table_column=rest),
            console=self.console,
            expand=True,
        )
        progress.start()
        try:
            yield progress
        except BaseException:
            progress.live.transient = True
            progress.live.stop()
            raise
        progress.stop()

    @contextlib.contextmanager
    def status(self, description: str) -> Iterator[None]:
        """A spinner while something without countable steps goes on."""
        with self.console.status(description):
            yield

    def finish(self, result: dict[str, Any]) -> None:
        """Set the JSON object of ``--json``; where ``result["ok"]`` is False the verb exits with 1."""
        self.result = result


@contextlib.contextmanager
def session(json: bool, debug: bool, *, keep_logs: bool = False) -> Iterator[Session]:
    """Give a verb its `Session`.

    Until the end everything that Megatron and its helpers print, in this process and in ranks, by ``print``, logging
    or from C++, is kept off stdout. It goes to stderr with `debug` or `keep_logs`, otherwise nowhere.

    Raises:
        typer.Exit: with status 1 where the verb finished with ``ok`` False.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(_detached(stream, fd)) for stream, fd in ((sys.stdout, 1), (sys.stderr, 2))]
        if debug or keep_logs:
            chatter = stack.enter_context(open(os.dup(2), "wb"))
        else:
            chatter = stack.enter_context(tempfile.TemporaryFile())
            import warnings

            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        for fd in (1, 2):
            stack.enter_context(_redirected_fd(fd, chatter.fileno()))
        stack.enter_context(contextlib.redirect_stdout(_fd2()))
        stack.enter_context(contextlib.redirect_stderr(_fd2()))
        current = Session(json, *outputs)
        yield current
    if current.result is not None:
        if json:
            sys.stdout.write(_dumps(current.result) + "\n")
            sys.stdout.flush()
        if not current.result.get("ok", True):
            raise typer.Exit(1)


def _fd2() -> IO[str]:
    """A stream on file descriptor 2 that outlives the session: logging handlers made in it keep it."""
    return open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)


@contextlib.contextmanager
def _detached(stream: IO[str], fd: int) -> Iterator[IO[str]]:
    """`stream` on a file descriptor of its own, so that redirecting `fd` leaves it alone."""
    try:
        on_fd = stream.fileno() == fd
    except (OSError, AttributeError):  # a test runner's in-memory stream
        on_fd = False
    if not on_fd:
        yield stream
        return
    with open(os.dup(fd), "w", buffering=1, encoding=stream.encoding, errors=stream.errors) as copy:
        yield copy


@contextlib.contextmanager
def _redirected_fd(fd: int, target: int) -> Iterator[None]:
    saved = os.dup(fd)
    os.dup2(target, fd)
    try:
        yield
    finally:
        os.dup2(saved, fd)
        os.close(saved)


def _dumps(value: Any) -> str:
    """JSON in which a number that JSON cannot write is null."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): plain(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [plain(entry) for entry in item]
        if isinstance(item, float):
            return item if math.isfinite(item) else None
        return item if isinstance(item, int | str | bool | None) else str(item)

    return json.dumps(plain(value), allow_nan=False)
