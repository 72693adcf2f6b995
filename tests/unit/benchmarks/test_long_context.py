"""The search for the longest row that fits, and the pictures."""

import pytest

from benchmarks import long_context
from benchmarks.memory_estimate import build, estimate
from falcon_bridge.training import memory


@pytest.mark.parametrize("recompute", long_context.RECOMPUTE)
def test_the_longest_row_fits_and_the_next_does_not(monkeypatch, recompute):
    limit, steps = 40 * 2**30, []
    monkeypatch.setattr(memory, "usable_memory", lambda: limit)
    monkeypatch.setattr(long_context, "step_of", lambda *arguments: steps.append(arguments))
    long_context.longest("500M", recompute, {})
    ((size, length, fields, _, figures),) = steps
    assert (figures["limit"], length % long_context.MULTIPLE) == (limit, 0)
    within, beyond = (
        estimate(build(size, tokens, 1, fields))["peak"] for tokens in (length, length + long_context.MULTIPLE)
    )
    assert within <= limit < beyond


def test_a_row_is_no_longer_than_the_kernels_reach(monkeypatch):
    lengths = []
    monkeypatch.setattr(memory, "usable_memory", lambda: 2**50)
    monkeypatch.setattr(long_context, "step_of", lambda size, length, *_: lengths.append(length))
    long_context.longest("500M", "full", {})
    assert 2**18 < lengths[0] < 2**32 // (2 * 1536 + 2 * 128 + 24) < lengths[0] + long_context.MULTIPLE


def test_pictures_leave_out_what_failed(tmp_path):
    def point(case, length, **more):
        return {"case": case, "length": length, "device": "H100", "peak": length * 10**5, **more}

    curves = [
        point(f"curve:500M:{pattern}:{length}", length, seconds=length / 1e4, estimate={"peak": length * 10**5})
        for pattern in ("SSM", "hybrid")
        for length in (16384, 8192)
    ]
    failed = {"case": "throughput:0.5B:transformers:32768", "error": "out of memory"}
    long_context.draw([*curves, failed], tmp_path / "images")
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["long_context_memory.png"]
    sides = [
        point(f"throughput:0.5B:{side}:{length}", length, side=side, tokens_per_s=length)
        for side in long_context.SIDES
        for length in (4096, 8192)
    ]
    long_context.draw([*curves, *sides, failed], tmp_path / "images")
    assert (tmp_path / "images" / "long_context_throughput.png").read_bytes().startswith(b"\x89PNG")
    assert "out of memory" in long_context.describe(failed)


def test_lengths_of_one_process_are_points_of_their_own():
    shared = {"case": "throughput:0.5B:transformers:4096,8192", "side": "transformers"}
    points = [{"length": length, "tokens_per_s": 1.0} for length in (4096, 8192)]
    found = long_context.one_by_one({**shared, "points": points})
    assert [figures["case"] for figures in found] == long_context.names_of(shared["case"])
    assert [figures["length"] for figures in found] == [4096, 8192] and "points" not in found[0]
    # what was measured before an error stays
    failed = long_context.one_by_one({**shared, "points": points[:1], "error": "out of memory"})
    assert [figures["case"] for figures in failed] == ["throughput:0.5B:transformers:4096", shared["case"]]
    assert long_context.one_by_one({"case": "longest:500M", "length": 3}) == [{"case": "longest:500M", "length": 3}]
