"""Every example runs as it stands, on few steps, and leaves what it says."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from .conftest import EXAMPLES


STEPS = 4
SCRIPTS = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".py") and path.name[0] != "_")


@pytest.fixture
def run(examples, tmp_path):
    """Run an example into tmp_path/out, which is relative to its working directory."""

    def invoke(name, *arguments):
        if name.endswith(".sh"):
            command = ["bash", EXAMPLES / name, "out", *arguments]
        else:
            command = ["python", EXAMPLES / name, "--out", "out", "--steps", STEPS, *arguments]
        finished = examples(command, tmp_path, STEPS=str(STEPS))
        assert finished.status == 0, finished.stderr[-4000:]
        return finished.stdout

    return invoke


def losses(directory):
    """Of each step, from the record that `train` leaves."""
    events = [json.loads(line) for line in (directory / "steps.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if "lr" in event]


def weights(directory):
    return load_file(directory / "model.safetensors")


def changed(before, after):
    """Names of the tensors that differ; both have the same names and shapes."""
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_pretrain(run, tmp_path):
    shown = run("pretrain.sh")
    found = losses(tmp_path / "out" / "run")
    assert len(found) == STEPS and found[-1] < found[0]
    assert "# falcon_h1_tiny_cpu_pretrain_config" in shown and "The following" in shown.splitlines()[-1]


def test_continue_pretraining(run, tmp_path):
    run("continue_pretraining.sh")
    out = tmp_path / "out"
    found = losses(out / "run")
    assert len(found) == STEPS and found[-1] < found[0]
    assert "TP 2" in (out / "run" / "report.md").read_text()
    before, after = weights(out / "falcon-h1"), weights(out / "hf")
    assert changed(before, after) == set(before)


def test_sft(run, tmp_path):
    shown = run("sft.sh")
    out = tmp_path / "out"
    found = losses(out / "run")
    assert len(found) == STEPS and found[-1] < found[0]
    before, after = weights(out / "falcon-h1"), weights(out / "hf")
    assert changed(before, after) == set(before)
    assert "about lambda?" in shown


def test_lora(run, tmp_path):
    shown = run("lora.py")
    start, end = map(float, re.search(r"loss (\S+) → (\S+) in", shown).groups())
    assert end < start
    out = tmp_path / "out"
    moved = changed(weights(out / "falcon-h1"), weights(out / "merged"))
    assert moved and all(re.search(r"(proj|in_proj|out_proj)\.weight$", name) for name in moved)


def test_bitnet_pretrain(run, tmp_path):
    run("bitnet_pretrain.sh")
    out = tmp_path / "out"
    found = losses(out / "run")
    assert len(found) == STEPS and found[-1] < found[0]
    name = "model.layers.0.mlp.down_proj.weight"
    latent, packed, plain = (weights(out / form)[name] for form in ("prequantized", "bitnet", "bf16"))
    assert packed.dtype == torch.uint8 and packed.numel() * 4 == latent.numel()
    assert len(plain.unique()) == 3 and len(latent.unique()) > 1000


def test_bitnet_finetune(run, tmp_path):
    shown = run("bitnet_finetune.sh")
    out = tmp_path / "out"
    found = losses(out / "run")
    assert len(found) == STEPS and found[-1] < found[0]
    assert json.loads((out / "bitnet" / "config.json").read_text())["quantization_config"]["quant_method"] == "bitnet"
    assert "they agree" in shown


def test_convert_and_verify(run, tmp_path):
    shown = run("convert_and_verify.sh")
    assert shown.count("they agree") == 2


def test_hybrid_design(run, tmp_path):
    shown = run("hybrid_design.py", "--ratios", "M=0.5,P=0.25,-=0.25", "--layers", "4")
    pattern = re.search(r"yours, `(\S+)`", shown).group(1)
    assert sorted(pattern) == sorted("MMP-")
    check_study(tmp_path / "out", "hybrid_design", 2)


def check_study(out, name, runs):
    """Its JSON has all steps of all runs, of about as many parameters each."""
    figures = json.loads((out / f"{name}.json").read_text())
    assert len(figures["curves"]) == runs and figures["device"].startswith("CPU") and figures["date"]
    parameters = [row["parameters"] for row in figures["runs"].values()]
    assert max(parameters) / min(parameters) < 1.005
    assert all(len(curve["losses"]) == STEPS for curve in figures["curves"].values())
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / f"{name}.md").read_text().count("\n") == runs + 2


def test_head_ratio_sweep_goes_on_with_what_it_has(run, tmp_path):
    run("head_ratio_sweep.py")
    out = tmp_path / "out"
    check_study(out, "head_ratio_sweep", 5)
    before = {path: path.stat().st_mtime_ns for path in (out / "curves").iterdir()}
    run("head_ratio_sweep.py")
    assert {path: path.stat().st_mtime_ns for path in (out / "curves").iterdir()} == before


def test_pattern_sweep(run, tmp_path):
    run("pattern_sweep.py")
    check_study(tmp_path / "out", "pattern_sweep", 5)


def test_convergence(run, tmp_path):
    run("convergence.py")
    out = tmp_path / "out"
    figures = json.loads((out / "convergence.json").read_text())
    assert figures["differences"]["resumed"] == {"steps": STEPS // 2, "first_10_max": 0.0, "max": 0.0, "mean": 0.0}
    assert figures["differences"]["resumed_tp2"]["max"] < 1e-4 and figures["differences"]["tp2"]["max"] < 1e-4
    curves = figures["curves"]
    assert abs(curves["ternary"]["losses"][0][1] - curves["dense"]["losses"][0][1]) > 1e-4
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_a_directory_that_exists_is_left_alone(examples, tmp_path):
    (tmp_path / "out").mkdir()
    finished = examples(["bash", EXAMPLES / "sft.sh", "out"], tmp_path)
    assert finished.status == 1 and "File exists" in finished.stderr and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_says_what_to_change_for_a_cluster_and_is_in_the_table(name):
    assert "On a cluster:" in (EXAMPLES / name).read_text()
    assert f"[{name}]({name})" in (EXAMPLES / "README.md").read_text()


def test_every_example_is_run_here():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    missing = [name for name in SCRIPTS if not any(test.startswith(name.partition(".")[0]) for test in tests)]
    assert not missing
