"""The verbs on sound input, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from falcon_bridge.demo.text import python_reference, train_tokenizer, write_indexed_dataset
from falcon_bridge.training.memory import count_parameters


TINY = "falcon_h1_tiny_cpu_pretrain_config"
SMALL = ["model.num_layers=1", "model.hidden_size=32", "dataset.seq_length=32", "train.micro_batch_size=4"]


def _json(result):
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def test_models(run):
    found = {row["provider"]: row for row in _json(run("models", "--json"))["models"]}
    assert len(found) == 7
    assert (
        found["FalconH1ModelProvider1P5BDeep"]["tp"] == [1, 2] or 3 not in found["FalconH1ModelProvider1P5BDeep"]["tp"]
    )
    assert found["FalconH1ModelProvider500M"]["tp"] == [1, 2, 4, 8]
    assert found["FalconH1ModelProvider3B"]["tp"] == [1, 2]
    assert found["FalconH1ModelProvider34B"]["tp"] == [1, 2, 4]
    assert found["FalconH1ModelProvider34B"]["parameters"] > 33e9


def test_recipes(run):
    from falcon_bridge import recipes

    rows = _json(run("recipes", "--json"))["recipes"]
    assert [row["name"] for row in rows] == list(recipes.RECIPES)
    for row in rows:
        assert row["parameters"] == count_parameters(getattr(recipes, row["name"])().model)


def test_convert_there_and_back(run, pristine, tmp_path):
    imported = _json(run("convert", "import", pristine, tmp_path / "megatron", "--json"))
    assert imported["ok"] and imported["tensors"] == 37 and imported["tokenizer"]
    again = run("convert", "import", pristine, tmp_path / "megatron", "--force")
    assert again.exit_code == 0 and "imported 37 tensors" in again.stdout
    assert imported["checksums_verified"] == ("no SHA-256 checksums" not in again.stdout)
    exported = _json(run("convert", "export", tmp_path / "megatron", tmp_path / "hf", "--json"))
    assert exported["config_from"] == "hf_source" and exported["tensors"] == 37
    assert (tmp_path / "hf" / "config.json").read_bytes() == (pristine / "config.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"megatron", "hf"}


def test_roundtrip_says_what_differs(run, pristine, monkeypatch):
    found = _json(run("convert", "roundtrip", pristine, "--json"))
    assert (found["params_compared"], found["params_mismatched"], found["config_differences"]) == (37, 0, {})
    from falcon_bridge.conversion import exporter
    from falcon_bridge.conversion.shards import write_shards

    def nudge(tensors, directory, **kwargs):
        return write_shards(
            ((name, tensor * (1 + 2**-20) if name.endswith("mamba.D") else tensor) for name, tensor in tensors),
            directory,
            **kwargs,
        )

    monkeypatch.setattr(exporter, "write_shards", nudge)
    result = run("convert", "roundtrip", pristine, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and not found["ok"]
    assert found["mismatched"] == ["model.layers.0.mamba.D", "model.layers.1.mamba.D"]


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


def test_dry_run_shows_the_resolved_configuration_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["train", "--recipe", "falcon_h1_7b_pretrain_config", "--dry-run", "--nproc", "16"]
    found = _json(run(*args, "--json", "model.tensor_model_parallel_size=4"))
    assert found["config"]["model"]["tensor_model_parallel_size"] == 4 and found["ranks"] == 16
    assert found["tokens_per_step"] == 512 * 4096
    # six FLOPs a token and parameter that multiplies (the embedding does not), and more for attention and the scan
    multiplying = found["parameters"] - 130049 * 3072
    assert 1 < found["flops_per_step"] / (6 * multiplying * found["tokens_per_step"]) < 1.3
    assert found["memory_bytes"]["weights"] == found["parameters"] // 4 * 2
    shown = run(*args)
    assert "tensor_model_parallel_size: 2" in shown.stdout and "GiB a rank" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_demo_refuses_a_directory_in_use(run, tmp_path):
    (tmp_path / "mine").write_text("x")
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 2 and "--force" in result.stderr and (tmp_path / "mine").read_text() == "x"
    result = run("demo", "--out", tmp_path / "mine", "--force")
    assert result.exit_code == 2 and "is a file" in result.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_import_leaves_nothing(pristine, tmp_path, signum):
    process = subprocess.Popen(
        [sys.executable, "-m", "falcon_bridge", "convert", "import", str(pristine), str(tmp_path / "a" / "megatron")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    while process.poll() is None and not list(tmp_path.glob("a/.megatron.*.partial")):
        time.sleep(0.02)
    process.send_signal(signum)
    _, stderr = process.communicate()
    assert process.returncode == 130 and stderr.splitlines() == ["error: interrupted"]
    assert list(tmp_path.iterdir()) == []
