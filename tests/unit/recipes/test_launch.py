"""Running what is launched, and refusals before it is."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import falcon_bridge
from falcon_bridge.errors import UserError
from falcon_bridge.recipes import launch
from falcon_bridge.training.recipe import load_recipe
from falcon_bridge.training.run import configure, run_pretrain
from tests.unit.peft.conftest import chats  # noqa: F401
from tests.unit.recipes.conftest import HARD, LARGE, SLURM, TINY


SFT = "falcon_h1_500m_sft_config"

pytestmark = pytest.mark.usefixtures("in_a_directory_of_its_own")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of one node: sbatch accepts, srun notes the arguments and the environment that reach the job."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    note = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['NOTE'], 'w'))"
    scripts = {
        "sbatch": 'for script; do :; done; bash -n "$script" && echo 4242',
        "scontrol": "echo node0",
        "srun": f'case "$*" in *hostname*) echo ::1;; *) exec {sys.executable} -c {shlex.quote(note)} "$@";; esac',
    }
    for name, body in scripts.items():
        (fakes / name).write_text(f"#!/bin/bash\n{body}\n")
        (fakes / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fakes}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTE", str(tmp_path / "note.json"))
    return tmp_path / "note.json"


@pytest.mark.parametrize("own", [False, True], ids=["ours", "user's"])
def test_arguments_and_environment_survive_the_shell(run, slurm, tmp_path, own):
    if own:
        # as in NeMo-Run's documentation: one task a node, no launcher, the default tunnel
        executor = run.SlurmExecutor(
            **SLURM, gpus_per_node=8, packager=run.Packager(), poll_estimated_start_time=False
        )
        before = executor.to_config()
    else:
        executor = launch.slurm_executor(**SLURM, env={"TRICKY": 'a\'b "c" $HOME; false'})
    with launch.experiment(LARGE, HARD, executor=executor, skip_status_at_exit=True) as exp:
        exp.run(detach=True)
    (job,) = exp.jobs
    assert job.handle.rpartition("/")[2] == "4242"
    (script,) = (tmp_path / "nemo_run").rglob("*_sbatch.sh")
    subprocess.run(["bash", script], check=True, capture_output=True)
    arguments, environment = json.loads(slurm.read_text())
    at = arguments.index("-m")
    assert arguments[at:] == ["-m", "falcon_bridge", "train", "--recipe", LARGE, *HARD]
    assert arguments[arguments.index("--nproc-per-node") + 1] == "8"
    if own:
        assert executor.to_config() == before
    else:
        assert environment["TRICKY"] == 'a\'b "c" $HOME; false'


def test_the_configuration_takes_fault_tolerance():
    assert load_recipe(TINY).ft is None
    assert configure(TINY, ["ft.enable_ft_package=true"]).ft.enable_ft_package is True


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"recipe": "falcon_h1_7b_pretrian_config"}, "did you mean 'falcon_h1_7b_pretrain_config'?"),
        ({"overrides": ["train.train_itres=3"]}, "did you mean 'train.train_iters'?"),
        ({"overrides": ["model.tensor_model_parallel_size=16"]}, "16"),
        ({"overrides": ["model.pipeline_model_parallel_size=11"]}, "8 ranks cannot hold TP·PP·CP"),
        ({"overrides": ["train.global_batch_size=17"]}, "must be a multiple of train.micro_batch_size"),
        ({"dataset": "data/corpus"}, "--dataset data/corpus as an absolute path"),
        ({"dataset": ["/data/web:0.7", "data/code:0.3"]}, "--dataset data/code:0.3 as an absolute path"),
        ({"hf_path": "./hf"}, "--hf-path ./hf as an absolute path"),
        ({"dataset": "/data/web:-1"}, "/data/web:-1: the weight after the colon must be above 0"),
        ({"dataset": "/data/web"}, "/data/web.bin does not exist"),
        ({"dataset": "/data/web"}, "where the files are the job's alone, --no-check-files (check_files=False)"),
        ({"hf_path": "/data/hf"}, "/data/hf does not exist"),
        ({"dataset": "/data/web", "hf_path": "tiiuae/x"}, "/data/web.bin does not exist"),
        ({"overrides": ["dataset.blend=[[/data/web],null]"]}, "/data/web.bin does not exist"),
        ({"peft_scheme": "lora"}, "--peft-scheme lora is for recipes that train adapters"),
        (
            {"recipe": SFT, "dataset": "/data/chats", "check_files": False},
            "no checkpoint to start from: give --hf-path",
        ),
        ({"recipe": SFT, "hf_path": "tiiuae/Falcon-H1-0.5B-Base"}, "has no data: give --dataset DIR"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, changes, text):
    call = {"recipe": LARGE, "executor": launch.slurm_executor(**SLURM)} | changes
    with pytest.raises(UserError) as raised, launch.experiment(**call):
        pass
    assert text in str(raised.value) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_about_files_says_nothing_of_them():
    executor = launch.slurm_executor(**SLURM)
    with pytest.raises(UserError) as raised:
        launch.render(LARGE, ["train.train_itres=3"], executor=executor, dataset="/data/web")
    assert "train.train_iters" in str(raised.value) and "files" not in str(raised.value)


@pytest.mark.parametrize(
    "where",
    [
        {"container_image": "image"},
        {"ssh_host": "login", "ssh_user": "me", "remote_job_dir": "/scratch"},
    ],
    ids=lambda where: next(iter(where)),
)
def test_files_elsewhere_are_the_jobs(where):
    executor = launch.slurm_executor(**SLURM, **where)
    job = {"executor": executor, "dataset": "/data/chats", "hf_path": "/data/hf"}
    assert "--dataset /data/chats --hf-path /data/hf" in launch.render(SFT, **job)
    with pytest.raises(UserError, match="/data/hf does not exist"):
        launch.render(SFT, **job, check_files=True)
    job["executor"] = launch.slurm_executor(**SLURM)
    assert "--dataset /data/chats --hf-path /data/hf" in launch.render(SFT, **job, check_files=False)


def test_fine_tuning_data_is_checked_before_it_is_submitted(chats):  # noqa: F811
    executor = launch.slurm_executor(**SLURM, gpus_per_node=1)
    job = {"executor": executor, "dataset": chats.data, "hf_path": str(chats.hf)}
    batch = f"train.global_batch_size={chats.rows}"
    assert f"--dataset {chats.data} --hf-path {chats.hf} {batch}" in launch.render(SFT, [batch], **job)
    with pytest.raises(UserError, match=f"has {chats.rows} rows, fewer than a batch of 800"):
        launch.render(SFT, ["train.global_batch_size=800"], **job)
    with pytest.raises(UserError, match="this recipe pretrains: use an sft or peft recipe"):
        launch.render(LARGE, **job)


def test_a_fine_tuning_goes_on_where_its_checkpoints_are():
    executor = launch.slurm_executor(**SLURM)
    load = "checkpoint.load=/data/runs/chats"
    assert load in launch.render(SFT, [load], executor=executor, dataset="/data/chats", check_files=False)


def test_a_local_fine_tuning_needs_data_and_a_checkpoint(tmp_path):
    executor = launch.local_executor(1)
    recipe = "falcon_h1_tiny_cpu_sft_config"
    with pytest.raises(UserError, match="no checkpoint to start from"), launch.experiment(recipe, executor=executor):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_that_starts_no_ranks_is_refused(run):
    from nemo_run.core.execution.launcher import Launcher

    executor = launch.slurm_executor(**SLURM)
    executor.launcher = Launcher()
    with pytest.raises(UserError, match="Launcher starts no ranks"), launch.experiment(LARGE, executor=executor):
        pass


def test_environment_names_that_would_change_are_refused():
    with pytest.raises(UserError, match="'https_proxy' cannot be set"):
        launch.slurm_executor(**SLURM, env={"https_proxy": "x"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_more_ranks_than_gpus(run):
    with (
        pytest.raises(UserError, match="8 ranks need 8 GPUs and this machine has 0"),
        launch.experiment(LARGE, executor=launch.local_executor(8)),
    ):
        pass


@pytest.mark.parametrize(
    ("stand_in", "text"),
    [
        (None, r"pip install falcon-bridge\[recipes\]"),
        ("import leptonai_of_the_future", "NeMo-Run does not import .*leptonai_of_the_future.*leptonai<0.47"),
    ],
)
def test_nemo_run_missing_or_broken(tmp_path, stand_in, text):
    if stand_in:
        (tmp_path / "nemo_run.py").write_text(stand_in)
    code = f"""
import sys, importlib.util
sys.path.insert(0, {str(tmp_path)!r})
if {stand_in is None}:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "nemo_run" else find(name, *rest)
from falcon_bridge.recipes.launch import nemo_run
nemo_run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and re.search(text, done.stderr.splitlines()[-1]), done.stderr


def test_importing_the_module_is_cheap():
    code = (
        "import sys; import falcon_bridge.recipes.launch; "
        "sys.exit([m for m in ('nemo_run', 'torch', 'megatron.bridge') if m in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ranks_of_a_launcher_that_do_not_fit_are_refused(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    cfg = configure(TINY, ["model.tensor_model_parallel_size=2"])
    with pytest.raises(UserError, match="3 ranks cannot hold TP·PP·CP = 2"):
        run_pretrain(cfg)


@pytest.fixture
def nemorun(run, monkeypatch):
    """NeMo-Run's command line with the entry point of pyproject.toml, and without Megatron Bridge's own."""
    from nemo_run.cli import api

    project = tomllib.loads((Path(falcon_bridge.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["nemo_run.cli"].items()
    points = EntryPoints(EntryPoint(name, value, "nemo_run.cli") for name, value in points)
    monkeypatch.setattr(api, "metadata", SimpleNamespace(entry_points=lambda: points))

    def invoke(*args):
        monkeypatch.setattr(sys, "argv", ["nemorun", *args])
        return CliRunner().invoke(api.create_cli(), args)

    return invoke


def test_nemorun_submits_a_recipe(nemorun, slurm, tmp_path):
    executor = ["run.executor=slurm", "run.executor.account=research", "run.executor.partition=gpu"]
    job = [f"recipe={LARGE}", f"overrides={json.dumps(HARD)}", "use_bitnet=true", "run.executor.nodes=2"]
    result = nemorun("falcon_bridge", "launch", "--yes", "--detach", *executor, *job)
    assert result.exit_code == 0, result.output
    (script,) = (tmp_path / "nemo_run").rglob("*_sbatch.sh")
    assert "#SBATCH --nodes=2" in script.read_text() and "#SBATCH --partition=gpu" in script.read_text()
    subprocess.run(["bash", script], check=True, capture_output=True)
    arguments, _ = json.loads(slurm.read_text())
    at = arguments.index("-m")
    assert arguments[at:] == ["-m", "falcon_bridge", "train", "--recipe", LARGE, "--use-bitnet", *HARD]


def test_nemorun_refuses_in_one_line(nemorun, tmp_path):
    executor = ["run.executor=slurm", "run.executor.account=research"]
    result = nemorun("falcon_bridge", "launch", "--yes", *executor, f"recipe={LARGE}")
    assert result.exit_code == 1 and "the executor lacks partition: give run.executor.partition=" in result.output
    executor.append("run.executor.partition=gpu")
    result = nemorun("falcon_bridge", "launch", "--yes", *executor, f"recipe={LARGE}", "hf_path=/nowhere/hf")
    assert result.exit_code == 1 and "/nowhere/hf does not exist" in result.output
    assert not list(tmp_path.rglob("*_sbatch.sh"))
