"""benchmarks/multi_gpu over gloo: its cases pass at tiny size, and one that fails does not take the others along."""

import json
import os
import time

import pytest
import torch.distributed as dist

import falcon_bridge.verification.megatron  # noqa: F401  the ranks are forked
from benchmarks.multi_gpu import __main__ as script
from benchmarks.multi_gpu.cases import Case, run_cases
from benchmarks.multi_gpu.exposed import exposed, length


def figure(value):
    total = [None] * dist.get_world_size()
    dist.all_gather_object(total, value)
    return {"total": sum(total)}


def refuse():
    raise ValueError("no rank can")


def fail_on_one_rank():
    if dist.get_rank() == 1:
        raise ValueError("this rank cannot")


def die():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def sleep():
    time.sleep(60)


def run(chosen, deadline=200.0):
    rows, log = [], []
    run_cases(
        [case if isinstance(case, Case) else Case(case.__name__, case) for case in chosen],
        2,
        environment={"MARK": "1"},
        deadline=time.monotonic() + deadline,
        on_row=rows.append,
        log=log.append,
    )
    return {row.pop("case"): row for row in rows}, "\n".join(log)


def test_a_case_that_fails_is_reported_and_the_others_run():
    sums = [Case(f"sum {n}", figure, (n,)) for n in range(4)]
    chosen = [sums[0], refuse, sums[1], fail_on_one_rank, sums[2], die, sums[3], Case("left out", die, skip="why")]
    rows, log = run(chosen)
    assert [rows[f"sum {n}"].get("total") for n in range(4)] == [0, 2, 4, 6]
    assert all(rows[f"sum {n}"]["ok"] for n in range(4))
    assert rows["refuse"]["ok"] is False and "no rank can" in rows["refuse"]["error"]
    assert rows["fail_on_one_rank"]["ok"] is False and "this rank cannot" in rows["fail_on_one_rank"]["error"]
    assert rows["die"]["ok"] is False and rows["die"]["error"]
    assert rows["left out"] == {"world": 2, "ok": None, "error": "why"}
    assert "in fail_on_one_rank" in log


def test_the_deadline_ends_what_runs_and_names_what_did_not():
    rows, _ = run([sleep, Case("late", figure, (1,))], deadline=3.0)
    assert rows["sleep"]["ok"] is False and rows["late"]["ok"] is False
    assert "deadline" in rows["late"]["error"]


@pytest.mark.parametrize(
    ("part", "only", "count"),
    [
        ("parity", "TP2×SP, bf16, packed", 1),
        ("checkpoint", "distributed-optimizer", 5),
        ("throughput", "tiny, 64 tokens", 2),
    ],
)
def test_parts_pass_over_gloo(part, only, count, tmp_path):
    assert script.main([part, "--ranks", "2", "--out", str(tmp_path), "--only", only, "--deadline", "200"]) == 0
    rows = json.loads((tmp_path / f"{part}-2.json").read_text())["rows"]
    assert len(rows) == count
    assert all(row["ok"] for row in rows), rows
    assert (tmp_path / f"{part}-2.md").read_text().count("| ok |") == count


def test_exposed_communication():
    assert length([(0, 2), (1, 3), (5, 6), (6, 7)]) == 5
    assert exposed([(0, 4), (10, 12)], [(1, 2), (3, 11)]) == 1 + 1 + 1
    assert exposed([], [(0, 1)]) == 0
    assert exposed([(0, 1)], []) == 1
