"""Cases on ranks that are started once: one that fails or hangs is reported, and the rest go on."""

import contextlib
import datetime
import gc
import logging
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from falcon_bridge.errors import FalconBridgeError, one_line
from falcon_bridge.ranks import emit, run_ranks


COLLECTIVE_SECONDS = 150.0  # kernels compile for less
VOTE_SECONDS = 60


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
    """

    name: str
    run: Callable[..., dict[str, Any] | None]
    arguments: tuple = ()
    skip: str | None = None


def run_cases(
    cases: list[Case],
    world_size: int,
    *,
    environment: dict[str, str],
    deadline: float,
    on_row: Callable[[dict[str, Any]], None],
    log: Callable[[str], None],
    collective_seconds: float = COLLECTIVE_SECONDS,
) -> None:
    """Run `cases` one after the other on `world_size` ranks.

    An exception that all ranks raise ends its case. One that leaves them out of step, and a rank that dies or waits in
    a collective for too long, ends the ranks, and new ones go on with the next case.

    Args:
        cases: in order.
        world_size: ranks, one a GPU; gloo ranks without GPUs.
        environment: of the ranks; read when they import their libraries.
        deadline: `time.monotonic()` at which what is left is given up.
        on_row: called with each row as it is known: `case`, `world`, `ok`, and what `run` returned or `error`.
        log: called with tracebacks.
        collective_seconds: after which a collective counts as hung, and its ranks are ended.
    """
    for case in cases:
        if case.skip:
            on_row({"case": case.name, "world": world_size, "ok": None, "error": case.skip})
    waiting = [case for case in cases if not case.skip]

    def report(case: Case, row: dict[str, Any]) -> None:
        on_row({"case": case.name, "world": world_size, **row})

    def check_deadline() -> None:
        if time.monotonic() > deadline:
            raise DeadlineError

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
            with mock.patch.dict(os.environ, environment):
                run_ranks(
                    _on_ranks,
                    world_size,
                    waiting,
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


def _on_ranks(cases: list[Case]) -> None:
    from falcon_bridge.compat import cpu_runtime

    logging.disable(logging.WARNING)
    torch.backends.cudnn.allow_tf32 = False
    first, world_size = dist.get_rank() == 0, dist.get_world_size()
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=VOTE_SECONDS))
    for number, case in enumerate(cases):
        if first:
            emit(("start", number))
        began, row, error = time.perf_counter(), {}, None
        try:
            with cpu_runtime():
                row = case.run(*case.arguments) or {}
        except Exception as raised:
            error = one_line(raised)
            emit(("error", "".join(traceback.format_exception(raised))))
        errors: list[str | None] = [None] * world_size
        dist.all_gather_object(errors, error, group=control)
        take_down()
        if first:
            failed = next((text for text in errors if text is not None), None)
            outcome = {"ok": False, "error": failed} if failed is not None else {"ok": True, **row}
            emit(("row", {**outcome, "seconds": round(time.perf_counter() - began, 1)}))
        if len(set(errors)) > 1:
            # out of step: what collectives some ranks are in, or gave up, is not known
            dist.barrier(group=control)
            dist.destroy_process_group()
            return


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
