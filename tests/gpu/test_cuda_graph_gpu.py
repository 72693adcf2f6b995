"""Whole iterations as CUDA graphs train as ordinary ones do: the same losses, weights and counts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.graphed import COMMON, SSM, STEPS, VALIDATIONS, both


pytestmark = pytest.mark.gpu

KINDS = {
    "Falcon-H1": ("FalconH1", SSM),
    "Falcon-H1, gated norm, recompute": ("FalconH1", {**SSM, "gated_norm": True, "recompute_mixer": True}),
    "Falcon-H1, ternary": ("FalconH1", {**SSM, "gated_norm": False, "use_bitnet": True}),
    "Falcon-Edge": ("FalconEdge", {}),
}
# kernels that add with atomics do so in another order each time, and Adam amplifies that where gradients are noise
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-2, 5e-2


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        ("Falcon-H1", False),
        ("Falcon-H1", True),
        ("Falcon-H1, gated norm, recompute", True),
        ("Falcon-H1, ternary", False),
        ("Falcon-Edge", False),
        ("Falcon-Edge", True),
    ],
)
def test_graphed_steps_are_the_same_steps(kind, apart, rank, report):
    family, fields = KINDS[kind]
    if family == "FalconH1":
        fields = {"gated_norm": False, **fields}
    eager, graphed = rank(both, family, fields, apart)
    assert graphed["weights"].keys() == eager["weights"].keys()
    flat, graphed_flat = (torch.cat([w.flatten() for w in one["weights"].values()]) for one in (eager, graphed))
    distance = ((graphed_flat - flat).norm() / flat.norm()).item()
    losses = {name: [eager[name], graphed[name]] for name in ("losses", "validations")}
    report(test="CUDA graph", kind=kind, apart=apart, weight_distance=distance, **losses)
    assert eager["graphs"] == [False, False] and graphed["graphs"] == [True, True]
    assert len(eager["losses"]) == STEPS and len(eager["validations"]) == len(VALIDATIONS)
    for name in ("losses", "validations"):
        assert graphed[name] == pytest.approx(eager[name], rel=LOSS_TOLERANCE), name
    assert graphed["squares"] == eager["squares"]
    assert distance <= WEIGHT_TOLERANCE
    # other data would have shown: each step's tokens are new to the model, or learnt four steps ago
    assert max(eager["losses"]) - min(eager["losses"]) > 0.2
    if apart:
        assert len(set(eager["squares"])) > 3


SCRIPT = """
import json, sys
from falcon_bridge.training.run import configure, preload, run_pretrain
preload()
import torch
replays = 0
replay = torch.cuda.CUDAGraph.replay
def counted(self):
    global replays
    replays += 1
    replay(self)
torch.cuda.CUDAGraph.replay = counted
reports = []
run_pretrain(configure(sys.argv[1], sys.argv[2:]), on_event=lambda rank, report: reports.append(report))
steps = [r for r in reports if hasattr(r, "grad_norm")]
evals = [r for r in reports if not hasattr(r, "grad_norm")]
print("RESULT", json.dumps({
    "losses": [r.loss for r in steps], "flops": [r.flops for r in steps], "evals": [r.loss for r in evals],
    "replays": replays,
}))
"""


RECIPE = "falcon_h1_500m_pretrain_config"
ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29533",
    "MAMBA_DETERMINISTIC": "1",
}


def overrides(directory: Path) -> list[str]:
    """A run of a small model with a validation and a checkpoint, its iterations captured."""
    fields = {**COMMON, **SSM, "cuda_graph_impl": "full_iteration"}
    del fields["vocab_size"]  # the recipe's, which its tokenizer has
    return [
        *(f"model.{name}={value}" for name, value in fields.items()),
        "train.train_iters=8",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "validation.eval_interval=4",
        "validation.eval_iters=4",
        "scheduler.lr_warmup_iters=2",
        "scheduler.lr_decay_iters=12",
        "scheduler.lr_wsd_decay_iters=2",
        "logger.log_interval=1",
        "dataset.num_workers=1",
        f"checkpoint.save={directory}/checkpoints",
        f"checkpoint.load={directory}/checkpoints",
        f"logger.tensorboard_dir={directory}/tb",
    ]


def train(directory: Path, *more: str) -> dict:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, RECIPE, *overrides(directory), *more],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        timeout=400,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, (done.stdout + done.stderr)[-6000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return directory, train(directory)


def test_a_recipe_with_one_override(first_run, report):
    directory, result = first_run
    report(test="recipe with CUDA graph", **result)
    # all steps but the two that warm up, and of four validation batches two
    assert len(result["losses"]) == 8 and result["replays"] >= 6 + 2
    assert all(math.isfinite(loss) for loss in result["losses"] + result["evals"])
    assert result["losses"][-1] < result["losses"][0]
    # mock documents differ from step to step, and those of replays are counted
    assert min(result["flops"]) > 0.5 * max(result["flops"]) > 0
    assert list((directory / "checkpoints").glob("iter_0000008"))


def test_it_goes_on_from_its_checkpoint(first_run, report):
    """The checkpoint has random number streams of the kind that a graph can hold."""
    directory, before = first_run
    result = train(directory, "train.train_iters=12")
    report(test="resumed with CUDA graph", **result)
    assert len(result["losses"]) == 4 and result["replays"] >= 2
    assert all(loss < before["losses"][0] for loss in result["losses"])
