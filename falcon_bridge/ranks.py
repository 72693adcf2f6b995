"""Run a function on the ranks of one machine: gloo on CPU, NCCL on GPU."""

import contextlib
import ctypes
import datetime
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from falcon_bridge.errors import FalconBridgeError, JobError, UserError, one_line


_PR_SET_PDEATHSIG = 1
_TERMINATE_GRACE_SECONDS = 2.0
_channel: multiprocessing.connection.Connection | None = None
_inherited: list[Any] = []


@dataclass(frozen=True)
class _Message:
    kind: str  # "event", "result" or "error"
    value: Any = None
    when: float = field(default_factory=time.monotonic)  # one clock for all processes of a machine


def emit(event: Any) -> None:
    """Send a picklable `event` to the `on_event` of the `run_ranks` that started this rank; elsewhere do nothing."""
    if _channel is not None:
        _send(_channel, _Message("event", event))


def launched_as_rank() -> bool:
    """Whether a launcher such as torchrun started this process as one of its ranks."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    device: str | None = None,
    on_event: Callable[[int, Any], None] | None = None,
    on_tick: Callable[[], None] | None = None,
    timeout_seconds: float = 1800.0,
    **kwargs: Any,
) -> list[Any]:
    """Run ``fn(*args, **kwargs)`` on `world_size` ranks with an initialised default process group.

    On CPU the ranks are forked, so what the caller has imported (Megatron Bridge takes 12–30 s) is imported already;
    each has one thread, and the group is gloo over the loopback interface. On GPU they are spawned, one a device, and
    the group is NCCL; `fn` must then be a module-level function. ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE`` are set.

    Args:
        fn: what each rank runs; it may call `emit`. Its result must be picklable.
        world_size: number of ranks.
        *args: for `fn`.
        device: ``"cpu"`` or ``"cuda"``; None takes CUDA where it is available.
        on_event: called here as ``on_event(rank, event)`` for each `emit` of a rank.
        on_tick: called here about ten times a second, to refresh a display without a thread.
        timeout_seconds: of a collective.
        **kwargs: for `fn`.

    Returns:
        What `fn` returned, by rank.

    Raises:
        UserError: fewer GPUs than ranks, or a rank raised one.
        JobError: a rank failed otherwise; the message is one line with the rank and its error, and the rank's
            traceback is the `__notes__` of the exception. The remaining ranks are ended first, with their children.
        KeyboardInterrupt: in this process or in a rank; all ranks are ended first.
    """
    import torch

    if world_size < 1:
        raise UserError(f"the number of ranks must be at least 1, not {world_size}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and torch.cuda.device_count() < world_size:
        raise UserError(
            f"the layout needs {world_size} GPUs and this machine has {torch.cuda.device_count()}: "
            "use a smaller --tp, --pp or --cp"
        )
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    processes, channels = [], []
    _drop_cached_groups()
    with tempfile.TemporaryDirectory(prefix="falcon_bridge_ranks_") as store_dir:
        setup = _RankSetup(world_size, device, str(Path(store_dir) / "store"), timeout_seconds)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_rank_main, args=(setup, rank, sender, fn, args, kwargs))
                channels.append(receiver)
                with _deferred_interrupts():
                    process.start()
                    processes.append(process)
                    # as the rank does itself, so that `_end` finds its group even if the rank has not come that far
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.setpgid(process.pid, process.pid)
                sender.close()
            return _collect(processes, channels, on_event, on_tick)
        finally:
            _end(processes)
            for channel in channels:
                channel.close()


@contextlib.contextmanager
def _deferred_interrupts() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block ends: what a handler raises in an after-fork hook is discarded.

    The handlers are replaced rather than the signals blocked, for a signal that the main thread blocks goes to another
    thread and Python still runs its handler in the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    came: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [signal.raise_signal(signum) for signum in came])
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            if handler is not None:  # None: not set from Python, and nothing of Python to be raised
                stack.callback(signal.signal, signum, handler)
                signal.signal(signum, lambda number, frame: came.append(number))
        yield


@dataclass(frozen=True)
class _RankSetup:
    world_size: int
    device: str
    store_path: str
    timeout_seconds: float


def _send(channel: multiprocessing.connection.Connection, message: _Message) -> None:
    # plain pickle: torch's ForkingPickler would hand tensors over in shared memory that dies with the rank
    channel.send_bytes(pickle.dumps(message))


def _rank_main(setup: _RankSetup, rank: int, channel: Any, fn: Callable, args: tuple, kwargs: dict) -> None:
    global _channel
    # its own process group, so that the parent can end the rank with the helpers it started, and so that Ctrl-C
    # reaches the parent only; and no rank outlives its parent
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # a forked rank has the handlers of `_deferred_interrupts`
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _channel = channel
    _keep_inherited_groups()
    try:
        with _environment(setup, rank):
            _send(channel, _Message("result", fn(*args, **kwargs)))
    except BaseException as error:
        # told before anything of this rank is torn down: peers that fail because it is gone come later
        _send(channel, _Message("error", _describe(error)))
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)


def _drop_cached_groups() -> None:
    """Drop process groups that Megatron's cache of rotary embeddings holds, here where their threads are.

    It is an `lru_cache` over the modules, which have a process group each: a forked rank that pushes an inherited
    entry out of it would destroy that group, whose destructor waits for ever for threads that are not there.
    """
    rotary = sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding")
    if rotary is not None:
        rotary.RotaryEmbedding.forward.cache_clear()


def _keep_inherited_groups() -> None:
    """Never drop a process group that a forked rank inherited: its destructor joins threads that are not here.

    Megatron's globals keep some of a parent's groups alive (`destroy_model_parallel` forgets a few) until
    `initialize_model_parallel` overwrites them here, which would wait for ever; others wait as garbage in cycles for
    the next collection.
    """
    gc.freeze()
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None:
        _inherited.extend(list(value) if isinstance(value, list) else value for value in vars(state).values())


@contextlib.contextmanager
def _environment(setup: _RankSetup, rank: int):
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(setup.world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(setup.world_size), TOKENIZERS_PARALLELISM="false")
    if setup.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if setup.device == "cpu" else "nccl",
        init_method=f"file://{setup.store_path}",
        rank=rank,
        world_size=setup.world_size,
        timeout=datetime.timedelta(seconds=setup.timeout_seconds),
    )
    yield
    if dist.is_initialized():
        # without it a rank that is done first closes connections that its peers still set up
        dist.barrier()
        dist.destroy_process_group()


def _describe(error: BaseException) -> tuple[type | None, str, str]:
    known = type(error) if isinstance(error, FalconBridgeError | KeyboardInterrupt) else None
    return known, one_line(error), "".join(traceback.format_exception(error))


def _collect(processes: list, channels: list, on_event: Callable | None, on_tick: Callable | None) -> list[Any]:
    results: dict[int, Any] = {}
    open_ranks = set(range(len(processes)))
    while open_ranks:
        ready = multiprocessing.connection.wait(
            [channels[rank] for rank in open_ranks], timeout=0.1 if on_tick else None
        )
        if on_tick:
            on_tick()
        messages = []
        for rank in sorted(open_ranks):
            if channels[rank] not in ready:
                continue
            try:
                messages.append((rank, pickle.loads(channels[rank].recv_bytes())))
            except EOFError:
                open_ranks.discard(rank)
                if rank not in results:
                    processes[rank].join()
                    messages.append((rank, _Message("error", (None, _death(processes[rank].exitcode), ""))))
        failures = [(rank, message) for rank, message in messages if message.kind == "error"]
        if failures:
            _raise(*min(failures, key=lambda failure: failure[1].when), len(processes))
        for rank, message in messages:
            if message.kind == "result":
                results[rank] = message.value
            elif on_event:
                on_event(rank, message.value)
    return [results[rank] for rank in range(len(processes))]


def _death(exitcode: int) -> str:
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + (": probably out of memory" if name == "SIGKILL" else "")
    return f"ended with status {exitcode} and no result"


def _raise(rank: int, message: _Message, world_size: int) -> None:
    known, text, trace = message.value
    if known is KeyboardInterrupt:
        raise KeyboardInterrupt
    where = f"rank {rank} of {world_size}: " if world_size > 1 else ""
    error = known(text) if known else JobError(where + text)
    if trace:
        error.add_note(trace)
    raise error


def _end(processes: list) -> None:
    """End ranks that still run, with the processes they started, and reap them."""
    alive = [process for process in processes if process.is_alive()]
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for process in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signum)
        deadline = time.monotonic() + _TERMINATE_GRACE_SECONDS
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
        alive = [process for process in alive if process.is_alive()]
    for process in processes:
        # a rank that ended may have left helpers (checkpoint writers) in its group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        process.close()
