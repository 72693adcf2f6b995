"""Cases on ranks that are started once: one that fails or hangs is reported, and the rest go on."""

import contextlib
import datetime
import gc
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from falcon_bridge.errors import FalconBridgeError, one_line
from falcon_bridge.ranks import emit, run_ranks


COLLECTIVE_SECONDS = 150.0  # kernels compile for less
VOTE_SECONDS = 60.0
IDLE_SECONDS = 3600.0  # for those that a case leaves out; the deadline comes first


class DeadlineError(Exception):
    """The time for all cases is over."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: first column of the table.
        run: what every rank calls; a module-level function whose result on rank 0 is the rest of the row. A row with
            `ok` false is a failure.
        arguments: for `run`; picklable.
        skip: why it is not run, if it is not.
        ranks: how many it takes, the first ones, which then are all that `torch.distributed` knows of; None takes all.
        part: whose table it is in.
    """

    name: str
    run: Callable[..., dict[str, Any] | None]
    arguments: tuple = ()
    skip: str | None = None
    ranks: int | None = None
    part: str = ""


def run_cases(
    cases: list[Case],
    world_size: int,
    *,
    environment: dict[str, str],
    deadline: float,
    on_row: Callable[[Case, dict[str, Any]], None],
    log: Callable[[str], None],
    collective_seconds: float = COLLECTIVE_SECONDS,
) -> None:
    """Run `cases` one after the other on `world_size` ranks, which are started once, or on the first few of them.

    An exception that all ranks raise ends its case. One that leaves them out of step, and a rank that dies or waits in
    a collective for too long, ends the ranks, and new ones go on with the next case.

    Args:
        cases: in order.
        world_size: ranks, one a GPU; gloo ranks without GPUs.
        environment: of the ranks; read when they import their libraries.
        deadline: `time.monotonic()` at which what is left is given up.
        on_row: called with each case and its row as it is known: `case`, `world`, `ok`, and what `run` returned or
            `error`.
        log: called with tracebacks.
        collective_seconds: after which a collective counts as hung, and its ranks are ended.
    """

    def report(case: Case, row: dict[str, Any]) -> None:
        on_row(case, {"case": case.name, "world": case.ranks or world_size, **row})

    def check_deadline() -> None:
        if time.monotonic() > deadline:
            raise DeadlineError

    for case in cases:
        if case.skip:
            report(case, {"ok": None, "error": case.skip})
    waiting = [case for case in cases if not case.skip]
    while waiting:
        # rows that these ranks reported, the case that they are in, and what a rank said about it
        done, started, reason = 0, -1, ""

        def on_event(rank: int, event: tuple[str, Any], waiting: list[Case] = waiting) -> None:
            nonlocal done, started, reason
            kind, value = event
            if kind == "start":
                started, reason = value, ""
            elif kind == "error":
                reason = reason or value.strip().splitlines()[-1]
                log(f"{waiting[max(started, 0)].name}, rank {rank} of {world_size}:\n{value}")
            else:
                # the first error is the cause, the others may follow from it
                report(waiting[done], {**value, "error": reason} if reason else value)
                done += 1

        try:
            check_deadline()
            with mock.patch.dict(os.environ, environment), tempfile.TemporaryDirectory(prefix="multi_gpu_") as stores:
                run_ranks(
                    _on_ranks,
                    world_size,
                    waiting,
                    Path(stores),
                    collective_seconds,
                    on_event=on_event,
                    on_tick=check_deadline,
                    timeout_seconds=collective_seconds,
                )
        except DeadlineError:
            for case in waiting[done:]:
                report(case, {"ok": False, "error": "not run to its end: the deadline had passed"})
            return
        except FalconBridgeError as raised:
            log("\n".join([str(raised), *getattr(raised, "__notes__", [])]))
            if started >= done or not done:  # in a case, or before any
                report(waiting[done], {"ok": False, "error": reason or one_line(raised)})
                done += 1
        waiting = waiting[done:]


def _on_ranks(cases: list[Case], stores: Path, collective_seconds: float) -> None:
    from falcon_bridge.compat import cpu_runtime

    logging.disable(logging.WARNING)
    torch.backends.cudnn.allow_tf32 = False
    ranks = _Ranks(stores, collective_seconds)
    for number, case in enumerate(cases):
        if ranks.rank == 0:
            emit(("start", number))
        taken = case.ranks or ranks.count
        ranks.regroup(taken, number)
        began, row, error = time.perf_counter(), {}, ""
        if ranks.rank < taken:
            try:
                with cpu_runtime():
                    row = case.run(*case.arguments) or {}
            except Exception as raised:
                error = one_line(raised)
                emit(("error", "".join(traceback.format_exception(raised))))
        errors = ranks.vote(number, taken, error)
        take_down()
        if ranks.rank == 0:
            failed = next(filter(None, errors), None)
            outcome = {"ok": False, "error": failed} if failed else {"ok": True, **row}
            emit(("row", {**outcome, "seconds": round(time.perf_counter() - began, 1)}))
        if len(set(errors)) > 1:
            # out of step: what collectives some ranks are in, or gave up, is not known
            ranks.vote(f"{number} ended", ranks.count, "")
            dist.destroy_process_group()
            return


class _Ranks:
    """This rank, among all that were started; they talk through a store that outlives the process groups."""

    def __init__(self, stores: Path, collective_seconds: float) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.stores, self.timeout = stores, datetime.timedelta(seconds=collective_seconds)
        self.backend = dist.get_backend()
        self.store = dist.FileStore(str(stores / "votes"), self.count)

    def regroup(self, count: int, number: int) -> None:
        """Make the first `count` ranks the default process group; the others have none."""
        if (dist.get_world_size() if dist.is_initialized() else 0) == (count if self.rank < count else 0):
            return
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.update(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        if self.rank < count:
            method = f"file://{self.stores / str(number)}"
            dist.init_process_group(
                self.backend, init_method=method, rank=self.rank, world_size=count, timeout=self.timeout
            )

    def vote(self, about: object, taken: int, text: str) -> list[str]:
        """What each of the first `taken` ranks says about something, known to all."""
        if self.rank < taken:
            self.store.set(f"{about}/{self.rank}", f"={text}")  # an empty value would delete the key
        self.store.set_timeout(datetime.timedelta(seconds=VOTE_SECONDS if self.rank < taken else IDLE_SECONDS))
        return [self.store.get(f"{about}/{rank}").decode()[1:] for rank in range(taken)]


def take_down() -> None:
    """Forget the model-parallel groups, also those of a model that was not finished."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    parallel_state.destroy_model_parallel()
    with contextlib.suppress(AttributeError):
        unset_num_microbatches_calculator()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
