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
from benchmarks.multi_gpu.inputs import DOCUMENTS, ROWS


def figure(value):
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"])
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
        on_row=lambda case, row: rows.append(row),
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


def test_cases_on_fewer_ranks_than_were_started():
    chosen = [Case(f"sum {n} of {ranks}", figure, (n,), ranks=ranks) for n, ranks in enumerate([1, 2, 1, None])]
    rows, _ = run([*chosen, Case("refuse", refuse, ranks=1), Case("sum after", figure, (5,))])
    assert [row.get("total") for row in rows.values()] == [0, 2, 2, 6, None, 10]
    assert [row["world"] for row in rows.values()] == [1, 2, 1, 2, 1, 2]
    assert rows["refuse"]["ok"] is False and "no rank can" in rows["refuse"]["error"]


def test_the_deadline_ends_what_runs_and_names_what_did_not():
    rows, _ = run([sleep, Case("late", figure, (1,))], deadline=3.0)
    assert rows["sleep"]["ok"] is False and rows["late"]["ok"] is False
    assert "deadline" in rows["late"]["error"]


def test_parts_pass_over_gloo(tmp_path):
    """One case of parity, the whole checkpoint part of one optimizer, one workload."""
    only = ["TP2×SP, bf16, packed", "bytes gathered", "distributed-optimizer", "tiny, 2 × 64 tokens"]
    parts, options = list(script.PARTS), ["--ranks", "2", "--out", str(tmp_path), "--deadline", "250"]
    chosen = [f"--only={text}" for text in only] + ["--skip=DP2-distributed-optimizer, "]
    assert script.main([*parts, *options, *chosen]) == 0
    counts = {"parity": 2, "checkpoint": 5, "throughput": 2}
    rows = {part: json.loads((tmp_path / f"{part}-2.json").read_text())["rows"] for part in parts}
    assert {part: len(found) for part, found in rows.items()} == counts
    for part, count in counts.items():
        assert all(row["ok"] for row in rows[part]), rows
        text = (tmp_path / f"{part}-2.md").read_text()
        assert text.count("| ok |") == count
        # and what is shown need not run again
        assert script.shown_as_ok(text, 2) == {row["case"] for row in rows[part]}
    # a token is 48 codes and an fp32 scale instead of 48 bf16 numbers, in linear_qkv, in_proj and linear_fc1 alike
    gathered = rows["parity"][0]
    assert gathered["gathered"] == pytest.approx((1 + 4 / 48) / 2, abs=1e-12)
    assert set(gathered["bytes"]["bitnet"]["forward"]) == {"linear_qkv", "in_proj", "linear_fc1", "others"}
    # layers, linears that gather, rows, tokens a rank, bytes a token
    linears = sum(n for name, n in gathered["bytes"]["bitnet"]["forward"].items() if name != "others")
    assert linears == 4 * 3 * ROWS * sum(DOCUMENTS) // 2 * (48 + 4)
    assert gathered["gathered"] < gathered["gathered_in_all"] < 1


def test_exposed_communication():
    assert length([(0, 2), (1, 3), (5, 6), (6, 7)]) == 5
    assert exposed([(0, 4), (10, 12)], [(1, 2), (3, 11)]) == 1 + 1 + 1
    assert exposed([], [(0, 1)]) == 0
    assert exposed([(0, 1)], []) == 1
