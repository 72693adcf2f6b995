"""What the tests of launching share: NeMo-Run in a directory of its own, recipes, and arguments hard to pass on."""

import os
import sys

import pytest

from falcon_bridge.recipes import launch


TINY = "falcon_h1_tiny_cpu_pretrain_config"
LARGE = "falcon_h1_7b_pretrain_config"
SLURM = {"account": "research", "partition": "gpu"}
# brackets, quotes, blanks, `$` and `*` all mean something to a shell
HARD = [
    "model.num_layers=2",
    "model.mlp_multipliers=[0.5,0.25]",
    "model.layer_pattern='P*'",
    "logger.tensorboard_dir='a b \"c\" $HOME'",
]


@pytest.fixture(scope="module")
def run():
    return launch.nemo_run()


@pytest.fixture
def in_a_directory_of_its_own(run, tmp_path, monkeypatch):
    """A working directory for one test, in which NeMo-Run's files are, too."""
    from nemo_run.run.torchx_backend.schedulers import local, slurm

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    # where NeMo-Run keeps its notes is read when it is imported
    monkeypatch.setattr(local, "LOCAL_JOB_DIRS", str(tmp_path / "nemo_run" / "local.json"))
    monkeypatch.setattr(slurm, "SLURM_JOB_DIRS", str(tmp_path / "nemo_run" / "slurm"))
    # invoke hands it to the commands it runs, and pytest's cannot be read
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield
