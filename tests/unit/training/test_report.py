import json
import struct
from types import SimpleNamespace

import pytest

from falcon_bridge.errors import UserError
from falcon_bridge.training.callbacks import EvalReport, StepReport
from falcon_bridge.training.loggers import active_loggers, check_loggers
from falcon_bridge.training.record import TrainingRecord, run_directory
from falcon_bridge.training.report import Run, write_report
from falcon_bridge.training.run import configure


TINY = "falcon_h1_tiny_cpu_pretrain_config"


def step(number, loss=None):
    loss = 6 / number if loss is None else loss
    return StepReport(number, loss, 1e-3, 0.5, False, 0.25, 1024, 2e9, 2**30 + number, number == 1)


def record_of(*events):
    record = TrainingRecord()
    for event in events:
        record.add(event)
    return record


@pytest.fixture
def run(tmp_path):
    cfg = configure(TINY, [f"checkpoint.save={tmp_path / 'checkpoints'}"])
    return Run(TINY, ["train", "--recipe", TINY, "dataset.split='1,1,1'"], cfg, 1, "CPU (a | b)")


def test_a_record_keeps_each_step_once_and_the_most_memory():
    record = record_of(
        StepReport(1, None, 1e-3, 0.5, False, memory=9 * 2**30),  # of a rank without the loss
        step(1),
        step(1),
        step(2),
        EvalReport(2, 4.0),
        EvalReport(2, 3.0),
        step(3),
    )
    assert [s.iteration for s in record.steps] == [1, 2, 3]
    assert record.evaluations == [EvalReport(2, 3.0)] and record.memory == 9 * 2**30


def test_report_says_what_was_run_and_how_it_went(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("40")
    record = record_of(*(step(n) for n in range(1, 41)), EvalReport(20, 0.4), EvalReport(40, 0.6))
    path = write_report(run, record, 83.0, "finished")
    text = path.read_text()
    assert path == tmp_path / "report.md"
    for part in (
        "Finished, at step 40 of 200",
        "6.0000 at step 1",
        f"{sum(6 / n for n in range(37, 41)) / 4:.4f} (mean of the last 4 steps)",
        "0.6000 at step 40; lowest 0.4000 at step 20",
        "40,960 in 40 steps",
        "4,096 tokens/s",
        "0.008 TFLOP/s",
        "1.00 GiB",
        "0:01:23",
        "`falcon-bridge train --recipe falcon_h1_tiny_cpu_pretrain_config 'dataset.split='\"'\"'1,1,1'\"'\"''`",
        f"falcon-bridge convert export {tmp_path / 'checkpoints'} HF_DIR",
        "TP 1, PP 1, CP 1, DP 1 on 1 rank",
        "CPU (a \\| b)",
        "megatron-core 0.19",
        "mock data",
    ):
        assert part in text, part
    assert len(text.splitlines()) < 60
    png = (tmp_path / "training.png").read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">II", png[16:24]) == (960, 720)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", "report.md", "training.png", "steps.jsonl"}


def test_a_resumed_run_reports_all_of_it_and_drops_what_it_does_again(run, tmp_path):
    write_report(
        run, record_of(*(step(n) for n in range(1, 8)), EvalReport(4, 2.0), EvalReport(7, 1.5)), 1.0, "finished"
    )
    # resumed from a checkpoint at step 4
    again = record_of(*(step(n, loss=0.125) for n in range(5, 10)), EvalReport(9, 1.0))
    text = write_report(run, again, 1.0, "interrupted").read_text()
    assert "Interrupted, at step 9 of 200" in text and "9,216 in 9 steps" in text and "steps 5 to 9" in text
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["loss"]) for line in lines if "lr" in line] == [
        *((n, 6 / n) for n in range(1, 5)),
        *((n, 0.125) for n in range(5, 10)),
    ]
    assert [line["iteration"] for line in lines if "lr" not in line] == [4, 9]


def test_nothing_is_written_where_there_is_nothing_to_say_or_nowhere_to_say_it(run, tmp_path):
    assert write_report(run, record_of(EvalReport(1, 1.0)), 1.0, "failed") is None
    run.cfg.checkpoint.save, run.cfg.logger.tensorboard_dir = None, None
    assert write_report(run, record_of(step(1)), 1.0, "failed") is None
    assert list(tmp_path.iterdir()) == []
    run.cfg.logger.tensorboard_dir = str(tmp_path / "run" / "tb_logs")
    assert run_directory(run.cfg) == tmp_path / "run"
    assert write_report(run, record_of(step(1)), 1.0, "failed (x)").read_text().count("None was written") == 1


def test_a_single_step_and_a_damaged_history_do_for_a_report(run, tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"iteration": 1}\nnot json')
    text = write_report(run, record_of(step(3)), 1.0, "finished").read_text()
    assert "2.0000 at step 3 → 2.0000 at step 3" in text


def logger(**fields):
    from megatron.bridge.training.config import LoggerConfig

    return SimpleNamespace(logger=LoggerConfig(**fields))


def test_loggers_that_cannot_start_are_refused(monkeypatch):
    from falcon_bridge.training import loggers

    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"logger\.wandb_project is for Weights & Biases.*wandb is not installed"):
        check_loggers(logger(wandb_project="p", wandb_exp_name="e"))
    with pytest.raises(UserError, match=r"logger\.mlflow_run_name.*mlflow is not installed"):
        check_loggers(logger(mlflow_run_name="r"))
    with pytest.raises(UserError, match="pip install comet-ml"):
        check_loggers(logger(comet_project="p"))
    monkeypatch.setattr(loggers, "find_spec", lambda package: package)
    with pytest.raises(UserError, match=r"set logger\.wandb_exp_name"):
        check_loggers(logger(wandb_project="p", wandb_exp_name=""))
    with pytest.raises(UserError, match=r"set logger\.mlflow_run_name"):
        check_loggers(logger(mlflow_experiment="p"))
    good = logger(wandb_project="p", wandb_exp_name="e", tensorboard_dir="/tb")
    check_loggers(good)
    check_loggers(logger())
    assert active_loggers(good) == ["TensorBoard in /tb", "Weights & Biases"]


def test_options_that_do_not_fit_the_recipe():
    with pytest.raises(UserError, match="recipes that train adapters"):
        configure(TINY, peft_scheme="lora")
    with pytest.raises(UserError, match=r"peft_scheme='lara' is not known"):
        configure("falcon_h1_tiny_cpu_peft_config", peft_scheme="lara")
    assert type(configure("falcon_h1_tiny_cpu_peft_config", peft_scheme="dora").peft).__name__ == "DoRA"
    assert configure(TINY, use_bitnet=True).model.use_bitnet
