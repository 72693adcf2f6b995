"""The table of estimated and measured parts."""

import pytest

from benchmarks.memory_estimate import CASES, build, estimate, parse_case, parts, show


def figures(case, **more):
    built, state, saved, peak = 3 * 2**30, 9 * 2**30, 20 * 2**30, 31 * 2**30
    measured = {"model_and_gradients": built, "state": state, "saved": saved, "peak": peak}
    measured |= {"peak_reserved": 33 * 2**30, "outside_the_allocator": 2**29}
    return {"case": case, "estimate": estimate(build(*parse_case(case))), **measured, **more}


@pytest.mark.parametrize("case", CASES)
def test_parts_add_up_to_the_peak(case):
    *rows, (name, estimated, measured) = parts(figures(case))
    assert name == "peak" and len(rows) == 4
    assert (sum(row[1] for row in rows), sum(row[2] for row in rows)) == (estimated, measured)


def test_a_table_of_cases_that_ran_and_one_that_did_not(capsys):
    ran = figures(CASES[0], saved_by_module={"decoder.layers.*.mlp": 2**31})
    show([ran, {"case": CASES[1], "error": "out of memory: Tried to allocate 7 TiB."}], modules=True)
    out = capsys.readouterr().out
    assert f"{ran['estimate']['peak'] / ran['peak']:.3f}" in out and "31.00" in out
    assert CASES[1] in out and "failed, see above" in out
    assert "2.000 GiB" in out and "decoder.layers.*.mlp" in out


def test_cases_name_fields_of_the_model():
    fields = 'recompute_mixer=true:recompute_granularity="selective":recompute_modules=["mlp"]'
    size, seq_length, rows, fields = parse_case(f"1P5B:8192:2:{fields}")
    assert (size, seq_length, rows) == ("1P5B", 8192, 2)
    model = build(size, seq_length, rows, fields).model
    assert model.recompute_mixer is True and model.recompute_modules == ["mlp"] and model.seq_length == 8192
