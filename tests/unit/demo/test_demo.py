import dataclasses
import json

import pytest

from falcon_bridge.demo.job import STAGES, _check_training, run_demo
from falcon_bridge.demo.result import DemoResult, DemoSettings
from falcon_bridge.errors import JobError
from falcon_bridge.training.callbacks import StepReport


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    seen = []
    settings = DemoSettings(
        out=out, steps=8, resume_steps=4, held_out_rows=3, held_out_length=100, sample_tokens=8, loss_drop=0.05
    )
    return settings, run_demo(settings, lambda *event: seen.append(event)), seen


def test_every_check_of_the_small_job_holds(finished):
    _, result, _ = finished
    assert result.ok and len(result.checks) == 5, result.checks


def test_all_stages_report_to_their_end(finished):
    settings, _, seen = finished
    last = {stage: (done, total) for stage, done, total, _ in seen}
    assert list(last) == list(STAGES) and all(done == total for done, total in last.values())
    assert last["train"] == (settings.steps, settings.steps)


def test_steps_are_numbered_through_the_resumption(finished):
    _, result, _ = finished
    assert [step.iteration for step in result.steps] == list(range(1, 13))
    assert all(step.lr > 0 and step.grad_norm > 0 and not step.skipped for step in result.steps)


def test_what_it_leaves(finished):
    settings, result, _ = finished
    names = {path.name for path in settings.out.iterdir()}
    assert {"hf_initial", "megatron_initial", "megatron", "hf_trained", "loss_curve.png", "sample.txt"} <= names
    summary = json.loads((settings.out / "summary.json").read_text())
    assert summary["ok"] and summary["losses"] == [step.loss for step in result.steps]
    assert (settings.out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((settings.out / "hf_trained" / "config.json").read_text())
    assert config == json.loads((settings.out / "hf_initial" / "config.json").read_text())
    assert config["vocab_size"] == 1021 and config["mamba_rms_norm"] and config["mamba_n_groups"] == 1


def _steps(losses):
    return [StepReport(number + 1, loss, 1e-3, 1.0, False) for number, loss in enumerate(losses)]


FALLING = [7.0 - 0.15 * i for i in range(24)]
SETTINGS = DemoSettings(out=None, steps=20, resume_steps=4, loss_drop=2.0)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (FALLING, [True, True]),
        ([7.0] * 24, [False, True]),
        ([*FALLING[:20], 7.0, 6.9, 6.8, 6.7], [False, False]),
        ([*FALLING[:20], *[1.0] * 4], [True, False]),
    ],
    ids=["sound", "flat", "forgot", "jumped"],
)
def test_the_checks_of_the_losses_can_fail(losses, expected):
    result = DemoResult(steps=_steps(losses))
    _check_training(SETTINGS, result)
    assert [check.ok for check in result.checks] == expected


def test_a_skipped_or_lost_step_is_seen():
    result = DemoResult(steps=_steps(FALLING))
    result.steps[3] = dataclasses.replace(result.steps[3], skipped=True)
    _check_training(SETTINGS, result)
    assert not result.ok
    with pytest.raises(JobError, match="instead of 1 to 24"):
        _check_training(SETTINGS, DemoResult(steps=_steps(FALLING[:-1])))
