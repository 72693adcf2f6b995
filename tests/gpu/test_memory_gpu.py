"""The memory estimate against the peaks of real training steps, with Transformer Engine and mamba-ssm."""

import pytest

from benchmarks.memory_estimate import CASES, parts
from benchmarks.processes import run_each


pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def measured():
    """Figures of each case, from a process of its own."""
    return {figures["case"]: figures for figures in run_each("benchmarks.memory_estimate", CASES)}


@pytest.mark.parametrize("case", CASES)
def test_estimated_peak_is_that_of_a_real_step(case, measured, report):
    figures = measured[case]
    assert "error" not in figures, figures["error"]
    report(case=case, parts=parts(figures))
    estimate = figures["estimate"]
    assert estimate["peak"] == pytest.approx(figures["peak"], rel=0.1)
    assert estimate["state"] == pytest.approx(figures["state"], rel=0.05)
    assert estimate["activations"] == pytest.approx(figures["saved"], rel=0.15)
