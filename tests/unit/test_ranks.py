import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.errors import JobError, UserError, one_line
from falcon_bridge.ranks import emit, run_ranks


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _sum(scale: float) -> tuple[int, torch.Tensor]:
    value = torch.tensor([1.0 + dist.get_rank(), scale])
    dist.all_reduce(value)
    return os.getpid(), value


def test_collective_results_come_back_by_rank():
    results = run_ranks(_sum, 3, 2.5, device="cpu")
    assert len({pid for pid, _ in results}) == 3 and os.getpid() not in {pid for pid, _ in results}
    for _, value in results:
        assert value.tolist() == [6.0, 7.5]


def _emitting():
    for step in range(3):
        emit((os.environ["RANK"], step))


def test_events_arrive_in_order_before_the_result():
    events = []
    run_ranks(_emitting, 2, device="cpu", on_event=lambda rank, event: events.append((rank, *event)))
    for rank in range(2):
        assert [event for event in events if event[0] == rank] == [(rank, str(rank), step) for step in range(3)]


def _fail(kind: str, pids: str):
    with open(f"{pids}/{dist.get_rank()}", "w") as file:
        file.write(str(os.getpid()))
    dist.barrier()
    if dist.get_rank() == 1:
        if kind == "value":
            raise ValueError("shape [3, 4]\n   is wrong")
        if kind == "user":
            raise UserError("use --tp 2")
        if kind == "interrupt":
            raise KeyboardInterrupt
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)
    if dist.get_rank() == 0:
        dist.barrier()  # fails when its peer goes, after the cause
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("value", JobError, "rank 1 of 3: ValueError: shape [3, 4] is wrong"),
        ("user", UserError, "use --tp 2"),
        ("interrupt", KeyboardInterrupt, ""),
        ("killed", JobError, "rank 1 of 3: killed by SIGKILL: probably out of memory"),
        ("exit", JobError, "rank 1 of 3: ended with status 7 and no result"),
    ],
)
def test_first_failure_is_raised_and_every_rank_is_gone(kind, error, text, tmp_path, monkeypatch):
    monkeypatch.setattr("falcon_bridge.ranks._TERMINATE_GRACE_SECONDS", 0.2)
    with pytest.raises(error) as caught:
        run_ranks(_fail, 3, kind, str(tmp_path), device="cpu")
    assert str(caught.value) == text
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 3 and not any(_alive(pid) for pid in pids)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_ranks_are_forked_is_raised(signum, monkeypatch):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    armed, parent = [True], os.getpid()
    # hooks stay registered: this one disarms itself
    os.register_at_fork(after_in_parent=lambda: armed and armed.pop() and os.kill(parent, signum))
    before = signal.signal(signum, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_ranks(_emitting, 2, device="cpu")
        assert signal.getsignal(signum) is interrupt and not armed
    finally:
        armed.clear()
        signal.signal(signum, before)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\n  b", "RuntimeError: a b"),
        ("bad file\nframe #0: c10::Error (0x7f)\nframe #1: main", "RuntimeError: bad file"),
        (
            "CheckpointException ranks:dict_keys([0])\nTraceback (most recent call last): (RANK 0)\n"
            '  File "x.py", line 1\n    f()\nEOFError: no data\n\nTraceback (most recent call last): (RANK 1)\n',
            "EOFError: no data",
        ),
        ("x" * 1000, "RuntimeError: " + "x" * 185 + "…"),
    ],
)
def test_one_line(message, line):
    assert one_line(RuntimeError(message)) == line
    assert one_line(UserError("x" * 300)) == "x" * 300


def test_bad_world_size():
    with pytest.raises(UserError, match="at least 1"):
        run_ranks(_sum, 0, 1.0)


def cached_embeddings():
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    return RotaryEmbedding.forward.cache_info().currsize


def test_no_process_group_is_inherited_through_megatrons_cache():
    """Forty models were run here: a rank's first one would push one of theirs out, and wait for ever."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    with cpu_runtime():
        for _ in range(40):
            RotaryEmbedding(kv_channels=8, rotary_percent=1.0, use_cpu_initialization=True)(4)
    assert cached_embeddings() == 32
    assert run_ranks(cached_embeddings, 2, device="cpu") == [0, 0]
