"""The memory estimate against the peaks of real training steps, with Transformer Engine and mamba-ssm."""

import pytest

from benchmarks.memory_estimate import CASES, run_case


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
def test_estimated_peak_is_that_of_a_real_step(case, report):
    figures = run_case(case, layer=1)
    peak = max(figures["peak_forward_backward"], figures["peak_optimizer"])
    estimate = figures["estimate"]
    report(
        case=case,
        measured_peak=peak,
        estimated_peak=estimate["peak"],
        measured_state=figures["state"],
        estimated_state=estimate["state"],
        saved=figures["saved"],
        estimated_activations=estimate["activations"],
    )
    assert estimate["peak"] == pytest.approx(peak, rel=0.1)
    assert estimate["state"] == pytest.approx(figures["state"] - figures["before_the_model"], rel=0.05)
    assert estimate["activations"] == pytest.approx(figures["saved"], rel=0.15)
