"""The verb train: what it trains, what it leaves behind, what --dry-run says."""

import json
from pathlib import Path

import pytest

from falcon_bridge.demo.checkpoint import write_initial_checkpoint
from falcon_bridge.demo.text import python_reference, train_tokenizer, write_indexed_dataset
from falcon_bridge.training.record import TrainingRecord
from tests.unit.data.chats import MARKED, conversations


TINY = "falcon_h1_tiny_cpu_pretrain_config"
SMALL = ["model.num_layers=1", "model.hidden_size=32", "dataset.seq_length=32", "train.micro_batch_size=4"]


def _json(result):
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    documents = python_reference().train[:12]
    tokenizer = train_tokenizer(documents, 401, directory / "tokenizer", 256)
    write_indexed_dataset(documents, tokenizer, directory / "text")
    return directory / "text"


def test_train_resumes_and_exports(run, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [*SMALL, "scheduler.lr_decay_iters=6", "scheduler.lr_wsd_decay_iters=2", "scheduler.lr_warmup_iters=1"]
    common = ["train", "--recipe", TINY, "--dataset", corpus, "--json", "dataset.split='70,15,15'", *overrides]
    # two ranks see each validation; the second run has one
    first = _json(
        run(*common, "train.train_iters=4", "validation.eval_interval=2", "model.tensor_model_parallel_size=2")
    )
    assert (first["first_step"], first["last_step"]) == (1, 4) and len(first["losses"]) == 4
    assert [evaluation["step"] for evaluation in first["evaluations"]] == [2, 4]
    assert first["evaluations"][0]["loss"] > 0
    second = _json(run(*common, "train.train_iters=6"))
    assert (second["first_step"], second["last_step"]) == (5, 6)
    assert second["losses"][0] < first["losses"][0]
    exported = _json(run("convert", "export", second["checkpoint"], tmp_path / "hf", "--json"))
    assert exported["config_from"] == "provider" and exported["iteration"] == 6


def test_train_from_a_checkpoint_keeps_its_files(run, pristine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    megatron = tmp_path / "megatron"
    _json(run("convert", "import", pristine, megatron, "--json"))
    args = ["train", "--recipe", TINY, "--hf-path", pristine, "dataset.seq_length=16", "train.global_batch_size=2"]
    args += ["train.micro_batch_size=2", "train.train_iters=1", "scheduler.lr_warmup_iters=0", "optimizer.lr=1e-30"]
    args += ["optimizer.min_lr=0.0", f"checkpoint.save={tmp_path / 'run'}", f"checkpoint.load={tmp_path / 'run'}"]
    args += ["validation.eval_iters=0", f"checkpoint.pretrained_checkpoint={megatron}"]
    _json(run(*args, "--json"))
    _json(run("convert", "export", tmp_path / "run", tmp_path / "hf", "--json"))
    from falcon_bridge.conversion.compare import compare_checkpoints

    # a step at this learning rate changes no weight
    assert compare_checkpoints(pristine, tmp_path / "hf").ok


def dry_run(run, recipe, *args):
    return _json(run("train", "--recipe", recipe, "--dry-run", "--json", *args))


def test_dry_run_shows_the_resolved_configuration_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = dry_run(run, "falcon_h1_7b_pretrain_config", "--nproc", "16", "model.tensor_model_parallel_size=4")
    assert found["config"]["model"]["tensor_model_parallel_size"] == 4 and found["ranks"] == 16
    assert found["tokens_per_step"] == 512 * 4096
    # six FLOPs a token and parameter that multiplies (the embedding does not), and more for attention and the scan
    multiplying = found["parameters"] - 130049 * 3072
    assert 1 < found["flops_per_step"] / (6 * multiplying * found["tokens_per_step"]) < 1.3
    assert found["memory_bytes"]["weights"] == pytest.approx(found["parameters"] / 4 * 2, rel=0.01)
    memory = found["memory_bytes"]
    assert memory["peak"] == memory["total"] == memory["state"] + memory["activations"] + memory["workspace"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_whether_it_fits_and_what_to_change(run):
    too_large = ["train", "--recipe", "falcon_h1_34b_pretrain_config", "--dry-run", "--nproc", "16"]
    shown = run(*too_large, "dataset.seq_length=16384").stdout
    assert (
        "does not fit: " in shown
        and "GiB with model.recompute_mixer=true" in shown
        and "pipeline_model_parallel_size: 4" in shown
    )
    stages = [line for line in shown.splitlines() if line.startswith("│")]
    assert len(stages) == 4 and [line.split()[1] for line in stages] == ["0", "1", "2", "3"]
    found = _json(run(*too_large, "dataset.seq_length=16384", "--json"))
    assert not found["fits"] and len(found["memory_bytes_by_stage"]) == 4
    change = found["changes_that_fit"][0]
    assert f"with {change['overrides']}\n" in shown  # brackets and all, in one line
    again = _json(
        run(*too_large[:-1], change["ranks"], "dataset.seq_length=16384", *change["overrides"].split(), "--json")
    )
    assert again["fits"] and again["memory_bytes"]["peak"] == change["peak_bytes"]
    # without --nproc, and where there is no GPU: the fewest that it fits on
    if not again["config"]["model"]["use_cpu_initialization"]:
        assert "fits: " in run("train", "--recipe", "falcon_h1_7b_pretrain_config", "--dry-run").stdout


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A checkpoint with a chat template, and conversations."""
    directory = tmp_path_factory.mktemp("chat_model")
    tokenizer = train_tokenizer(python_reference().train[:12], 401, directory / "hf", 256)
    write_initial_checkpoint(directory / "hf", tokenizer, 3, 256)
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(directory / "hf")
    (directory / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in conversations(30)))
    return directory


def test_fine_tuning_needs_a_start_and_its_own_data_and_leaves_a_report(
    run, chat_model, corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train = ["train", "--recipe", "falcon_h1_tiny_cpu_sft_config", "train.train_iters=3", "scheduler.lr_decay_iters=9"]
    train += ["scheduler.lr_warmup_iters=1", "scheduler.lr_wsd_decay_iters=1", "train.global_batch_size=2"]
    start = ["--hf-path", chat_model / "hf"]
    packed = tmp_path / "packed"
    prepare = ["data", "prepare-chat", chat_model / "chat.jsonl", "--tokenizer", chat_model / "hf", "--out", packed]
    _json(run(*prepare, "--seq-length", "256", "--json"))
    for args, problem in (
        ([], "no checkpoint to start from: give --hf-path"),
        (start, "no data: give --dataset DIR"),
        ([*start, "--dataset", corpus], "fine-tunes on packed chat data"),
        ([*start, "--dataset", packed, "dataset.seq_length=128"], "packed to rows of 256 tokens"),
    ):
        result = run(*train, *args)
        assert result.exit_code == 2 and problem in result.stderr.replace("\n", " "), (args, result.stderr)
        assert {path.name for path in tmp_path.iterdir()} == {"packed"}
    found = _json(run(*train, *start, "--dataset", packed, "--json"))
    assert found["last_step"] == 3 and found["losses"][2] < found["losses"][0]
    assert found["tokens_per_second"] > 0 and found["mfu"] is None and found["peak_memory_bytes"] > 2**26
    report = Path(found["report"]).read_text()
    assert str(packed) in report and str(chat_model / "hf") in report and "Finished, at step 3 of 3" in report
    assert (Path(found["report"]).parent / "training.png").stat().st_size > 10_000

    # the same data for adapters, which export by themselves and merged
    train[2] = "falcon_h1_tiny_cpu_peft_config"
    found = _json(run(*train, *start, "--dataset", packed, "--json"))
    for rest, form, file in (
        (["adapter"], "adapter", "adapter_config.json"),
        (["merged", "--merge"], "merged", "config.json"),
    ):
        assert _json(run("convert", "export", found["checkpoint"], *rest, "--json"))["form"] == form
        assert (tmp_path / rest[0] / file).is_file()
    refused = run("convert", "export", found["checkpoint"], "other", "--format", "bitnet")
    assert refused.exit_code == 2 and "no adapters" in refused.stderr and not (tmp_path / "other").exists()


def test_a_logger_that_is_not_installed_is_refused_at_the_start(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("falcon_bridge.training.loggers.find_spec", lambda package: None)
    result = run("train", "--recipe", TINY, "logger.wandb_project=p", "logger.wandb_exp_name=e")
    assert result.exit_code == 2 and "wandb is not installed" in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [(KeyboardInterrupt(), 130, "Interrupted"), (RuntimeError("no more"), 1, "Failed (RuntimeError: no more)")],
    ids=["Ctrl-C", "failure"],
)
def test_a_run_that_ends_early_reports_as_far_as_it_got(run, tmp_path, monkeypatch, error, status, text):
    monkeypatch.chdir(tmp_path)
    add = TrainingRecord.add

    def stop(record, event):
        new = add(record, event)
        if len(record.steps) == 3:
            raise error
        return new

    monkeypatch.setattr(TrainingRecord, "add", stop)
    result = run("train", "--recipe", TINY, *SMALL, "train.train_iters=50", "scheduler.lr_warmup_iters=1")
    assert result.exit_code == status
    (report,) = tmp_path.rglob("report.md")
    assert f"{text}, at step 3 of 50." in report.read_text()
    assert not list(tmp_path.rglob("*.partial"))


def test_tensorboard_and_ternary_layers(run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    args = ["train.train_iters=3", "scheduler.lr_warmup_iters=1", "checkpoint.save=null", "validation.eval_iters=0"]
    args += [f"logger.tensorboard_dir={tmp_path / 'run' / 'tb_logs'}"]
    found = _json(run("train", "--recipe", TINY, "--use-bitnet", *SMALL, *args, "--json"))
    events = EventAccumulator(str(tmp_path / "run" / "tb_logs")).Reload()
    assert [scalar.step for scalar in events.Scalars("lm loss")] == [1, 2, 3]
    assert [scalar.value for scalar in events.Scalars("lm loss")] == pytest.approx(found["losses"], rel=1e-5)
    assert found["report"] == str(tmp_path / "run" / "report.md")
    assert "--use-bitnet" in Path(found["report"]).read_text()
