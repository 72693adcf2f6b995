"""The verbs on sound input, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from falcon_bridge.training.memory import count_parameters


def _json(result):
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def test_models(run):
    found = {row["provider"]: row for row in _json(run("models", "--json"))["models"]}
    assert len(found) == 9
    assert (
        found["FalconH1ModelProvider1P5BDeep"]["tp"] == [1, 2] or 3 not in found["FalconH1ModelProvider1P5BDeep"]["tp"]
    )
    assert found["FalconH1ModelProvider500M"]["tp"] == [1, 2, 4, 8]
    assert found["FalconH1ModelProvider3B"]["tp"] == [1, 2]
    assert found["FalconH1ModelProvider34B"]["tp"] == [1, 2, 4]
    assert found["FalconH1ModelProvider34B"]["parameters"] > 33e9
    assert sum(name.startswith("FalconEdge") for name in found) == 2


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
    refused = run("convert", "export", tmp_path / "megatron", tmp_path / "packed", "--format", "bitnet")
    assert refused.exit_code == 2 and "--format bitnet is for ternary models" in refused.stderr
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


def test_demo_refuses_a_directory_in_use(run, tmp_path):
    (tmp_path / "mine").write_text("x")
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 2 and "--force" in result.stderr and (tmp_path / "mine").read_text() == "x"
    result = run("demo", "--out", tmp_path / "mine", "--force")
    assert result.exit_code == 2 and "is a file" in result.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_import_leaves_nothing(pristine, tmp_path, signum):
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", "falcon_bridge", "convert", "import", pristine, directory / "a" / "megatron"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        while process.poll() is None and not list(directory.glob("a/.megatron.*.partial")):
            time.sleep(0.002)
        process.send_signal(signum)
        _, stderr = process.communicate()
        if process.returncode:
            break  # else the import was over before the signal came
    assert process.returncode == 130 and stderr.splitlines() == ["error: interrupted"]
    assert list(directory.iterdir()) == []
