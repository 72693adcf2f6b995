"""Fresh processes of the benchmarks: a case that fails does not take the next one along."""

import io
import os
import time
from pathlib import Path

import pytest

from benchmarks.processes import answer, run_each, write_json


PROBE = """
import os, sys
from benchmarks.processes import answer

def run(case, figures):
    figures["argument"] = sys.argv[3:]
    if case == "out of memory":
        raise MemoryError("CUDA out of memory. Tried to allocate 7 TiB.")
    if case == "refused":
        raise ValueError("no such shape")
    if case == "killed":
        os._exit(9)
    figures["found"] = case

print("warning " * 20000, file=sys.stderr)
answer(sys.argv[2], run, MemoryError)
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])]))
    return "probe"


def test_each_case_says_what_came_of_it(probe, tmp_path):
    cases, results = ["first", "out of memory", "refused", "killed"], []
    for figures in run_each(probe, cases, "--more"):
        results.append(figures)
        write_json(tmp_path / "results.json", results)
    assert results[0] == {"case": "first", "argument": ["--more"], "found": "first"}
    assert results[1]["argument"] == ["--more"] and "Tried to allocate 7 TiB" in results[1]["error"]
    assert results[2]["error"] == "exit status 1: ValueError: no such shape"
    assert results[3]["error"].startswith("exit status 9: ")
    assert [figures["case"] for figures in results] == cases


def test_nothing_starts_behind_the_deadline(probe):
    results = list(run_each(probe, ["first", "second"], deadline=time.monotonic() - 1))
    assert [figures["error"] for figures in results] == ["not run: the deadline has passed"] * 2


def test_a_case_is_not_for_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SystemExit, match="use --case"):
        answer("500M:4096:4", lambda case, figures: None, MemoryError)
