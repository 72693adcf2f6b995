"""The verb ``verify``, with ranks of its own."""

import json

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from falcon_bridge.cli.app import app
from falcon_bridge.conversion.importer import import_checkpoint
from falcon_bridge.verification.checkpoints import write_random_checkpoint
from falcon_bridge.verification.layout import ParallelLayout


def run(*args):
    result = CliRunner().invoke(app, ["verify", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("hf") / "model", "tied_groups2_gated_norm", seed=4)


def test_json_under_a_layout(checkpoint):
    options = ("--tp", 2, "--sequence-parallel", "--train-step", "--seq-length", 20, "--batch-size", 2, "--json")
    status, stdout, _ = run(checkpoint, *options)
    report = json.loads(stdout)
    assert status == 0
    assert report["ok"] is True
    assert report["params_compared"] == len(load_file(checkpoint / "model.safetensors"))
    assert report["params_mismatched"] == 0
    assert 0 < report["max_abs_logit_diff"] <= 1e-5 * report["max_abs_logit"]
    assert abs(report["loss_hf"] - report["loss_megatron"]) <= 2e-6
    assert 0 < report["max_rel_grad_diff"] <= 1e-4
    assert report["layout"] == {"tp": 2, "pp": 1, "vp": 1, "cp": 1, "dp": 1, "sequence_parallel": True}
    assert report["dtype"] == "fp32"
    assert {"cosine", "next_token_agreement", "seconds"} <= report.keys()


def test_packed_pipeline_in_words(checkpoint):
    status, stdout, _ = run(checkpoint, "--pp", 2, "--packed", "--seq-length", 30)
    assert status == 0
    assert "PP2, fp32" in stdout
    assert "they agree" in stdout


def test_bf16(tmp_path):
    # the multipliers of a released model: with larger branches, two bf16 runs of transformers would differ as much
    checkpoint = write_random_checkpoint(tmp_path / "model", "released_multipliers", seed=4)
    status, stdout, _ = run(checkpoint, "--dtype", "bf16", "--seq-length", 32, "--json")
    report = json.loads(stdout)
    assert status == 0
    assert report["dtype"] == "bf16"
    assert report["params_mismatched"] == 0
    assert report["cosine"] >= 0.9999
    assert report["max_abs_logit_diff"] > 1e-5 * report["max_abs_logit"]


def test_a_megatron_checkpoint_is_what_is_verified(checkpoint, tmp_path):
    """The same weights agree; a checkpoint trained on, here one changed row, does not, and ends with status 1."""
    import_checkpoint(checkpoint, tmp_path / "same", ParallelLayout())
    status, stdout, _ = run(checkpoint, "--megatron", tmp_path / "same", "--tp", 2, "--seq-length", 16, "--json")
    assert (status, json.loads(stdout)["params_mismatched"]) == (0, 0)

    source = write_random_checkpoint(tmp_path / "source", "tied_groups2_gated_norm", seed=4)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mamba.out_proj.weight"][3] *= 1.1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(source, tmp_path / "other", ParallelLayout())
    status, stdout, _ = run(checkpoint, "--megatron", tmp_path / "other", "--seq-length", 16)
    assert status == 1
    assert "model.layers.1.mamba.out_proj.weight" in " ".join(stdout.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tp", 3), "--tp 3 does not divide the model's 4 attention heads: it can be 1, 2, 4"),
        (("--cp", 2), "use --cp 1"),
        (("--vp", 2), "--pp 2 or more"),
        (("--pp", 2, "--vp", 2), "2 layers do not split evenly"),
        (("--sequence-parallel",), "--tp 2 or more"),
        (("--dp", 2, "--batch-size", 3), "multiple of dp·pp = 2"),
        (("--dtype", "fp16"), "fp32 or bf16"),
        (("--seq-length", 1), "--seq-length must be at least 2"),
        (("--packed", "--seq-length", 7), "at least 8 tokens"),
        (("--megatron", "nowhere"), "nowhere is no directory"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_in_one_line(options, says, checkpoint):
    status, stdout, stderr = run(checkpoint, *options)
    assert status == 2
    assert says in stderr
    assert len(stderr.splitlines()) == 1
    assert not stdout


def test_a_directory_that_is_no_checkpoint(tmp_path):
    status, _, stderr = run(tmp_path)
    assert status == 2
    assert "config.json" in stderr
    assert len(stderr.splitlines()) == 1
