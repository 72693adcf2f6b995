"""The verb ``launch``: Slurm without a cluster, and jobs that really run on this machine's CPU."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.peft.conftest import chats  # noqa: F401


TINY = "falcon_h1_tiny_cpu_pretrain_config"
LARGE = "falcon_h1_7b_pretrain_config"
SLURM = ["--executor", "slurm", "--account", "research", "--partition", "gpu"]
SMALL = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "dataset.seq_length=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "validation.eval_iters=0",
    "train.train_iters=3",
]


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    from nemo_run.run.torchx_backend.schedulers import local, slurm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMORUN_HOME", "")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    # where NeMo-Run keeps its notes is read when it is imported
    monkeypatch.setattr(local, "LOCAL_JOB_DIRS", str(tmp_path / "nemo_run" / "local.json"))
    monkeypatch.setattr(slurm, "SLURM_JOB_DIRS", str(tmp_path / "nemo_run" / "slurm"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    # invoke hands it to the commands it runs, and pytest's cannot be read
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


def _line(result):
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line == result.stderr.splitlines()[-1] and len(line) < 500
    return line


def test_help_has_an_example(run):
    result = run("launch", "--help")
    assert result.exit_code == 0 and "falcon-bridge launch" in result.stdout and "Example" in result.stdout


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--executor", "slrum"], "did you mean 'slurm'?"),
        (["--executor", "kubernetes"], "use local or slurm, or your own executor from Python"),
        (["--executor", "slurm"], "--executor slurm needs --account and --partition"),
        (["--executor", "slurm", "--account", "a"], "needs --partition"),
        ([*SLURM, "--nproc", "2"], "--nproc is for --executor local"),
        ([*SLURM, "--container-mounts", "/a:/b"], "--container-mounts needs --container-image"),
        ([*SLURM, "--env", "HOME"], "--env 'HOME': write KEY=VALUE"),
        ([*SLURM, "--env", "A;B=1"], "--env 'A;B=1': write KEY=VALUE"),
        ([*SLURM, "--ssh-host", "login"], "--ssh-host needs --ssh-user"),
        ([*SLURM, "--ssh-host", "login", "--ssh-user", "me", "--job-dir", "x"], "an absolute directory on that host"),
        ([*SLURM, "--ssh-identity", "key"], "need --ssh-host"),
        (SLURM, "there is no sbatch here"),
        (["--executor", "local", "--nodes", "2", "--time", "1:00:00"], "--nodes, --time need --executor slurm"),
        (["--executor", "local", "train.micro_batch_size=3"], "global_batch_size=8 must be a multiple"),
        (["--executor", "local", "train.train_itres=3"], "did you mean 'train.train_iters'?"),
        (["--executor", "local", "--dataset", "/nowhere/corpus"], "/nowhere/corpus.bin does not exist"),
        (["--executor", "local", "--dataset", "/nowhere/a:0.3", "--dataset", "/nowhere/b"], "/nowhere/a.bin does not"),
        (["--executor", "local", "--peft-scheme", "dora"], "--peft-scheme dora is for recipes that train adapters"),
        (["--executor", "local", "--no-check-files"], "--check-files need --executor slurm"),
        (["--executor", "local", "--plugin", "fault_tolerance"], "--plugin fault_tolerance needs --executor slurm"),
        (["--executor", "local", "--plugin", "nsis"], "unknown plugin 'nsis': did you mean 'nsys'?"),
        (["--executor", "local", "--plugin", "x"], "unknown plugin 'x': use preemption, fault_tolerance, nsys"),
        (["--executor", "local", "--plugin", "preemption.time=3"], "unknown key 'time' of plugin preemption"),
        (["--executor", "local", "--plugin", "preemption=3"], "write NAME or NAME.KEY=VALUE"),
        (["--executor", "local", "--plugin", "nsys.profile_ranks=[0"], "cannot be read"),
        (["--executor", "local", "--plugin", "preemption.preempt_time=soon"], "must be an integer, not 'soon'"),
        (["--executor", "local", "--plugin", "nsys.profile_step_end=3"], "needs --plugin nsys.profile_step_start=…"),
        (["--executor", "local", "--plugin", "wandb.project=x"], "does nothing without an API key: set WANDB_API_KEY"),
        ([*SLURM, "--dry-run", "--plugin", "nsys", "--plugin", "fault_tolerance"], "exclude each other"),
        ([*SLURM, "--dry-run", "--dataset", "/nowhere/corpus"], "/nowhere/corpus.bin does not exist"),
        ([*SLURM, "--gpus-per-node", "3", "--dry-run", "model.tensor_model_parallel_size=2"], "3 ranks cannot hold"),
    ],
)
def test_a_launch_that_cannot_be(run, tmp_path, args, text):
    result = run("launch", "--recipe", TINY, *args)
    assert result.exit_code == 2 and text in _line(result) and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_a_gpu_recipe_on_this_machine(run, tmp_path):
    result = run("launch", "--recipe", LARGE, "--executor", "local")
    assert result.exit_code == 2 and "is for GPUs" in _line(result) and list(tmp_path.iterdir()) == []


def test_the_script_of_a_dry_run(run, tmp_path):
    image = ["--container-image", "registry#team/image:1", "--container-mounts", "/data:/data,/home/me:/me"]
    more = ["--nodes", "2", "--gpus-per-node", "4", "--time", "04:00:00", "--env", "HF_HOME=/data/hf", "--sbatch"]
    args = [*SLURM, *image, *more, "mail-user=me", "--job-dir", "jobs", "--dry-run", "train.train_iters=3"]
    result = run("launch", "--recipe", LARGE, *args)
    assert result.exit_code == 0
    script = result.stdout
    for text in (
        "#SBATCH --account=research",
        "#SBATCH --partition=gpu",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=04:00:00",
        "#SBATCH --mail-user=me",
        f"#SBATCH --output={tmp_path}/jobs/experiments/",
        "export HF_HOME=/data/hf",
        "--container-image registry#team/image:1 --container-mounts /data:/data,/home/me:/me,",
        "--nproc-per-node 4",
        f"-m falcon_bridge train --recipe {LARGE} train.train_iters=3",
    ):
        assert text in script
    assert list(tmp_path.iterdir()) == []
    as_json = json.loads(run("launch", "--recipe", LARGE, *args, "--json").stdout)
    changing = r"\d{19}|--rdzv-id \d+"
    assert re.sub(changing, "", as_json["script"]).strip() == re.sub(changing, "", script).strip()


def test_everything_reaches_the_script(run, tmp_path):
    """What `train` takes, and Megatron Bridge's plugins."""
    data = ["--dataset", "/data/web:0.7", "--dataset", "/data/code:0.3", "--hf-path", "/data/hf", "--no-check-files"]
    plugins = ["preemption", "preemption.preempt_time=90", "nsys.profile_step_start=5", "nsys.profile_step_end=7"]
    plugins = [text for plugin in [*plugins, "nsys.nsys_trace=[cuda]"] for text in ("--plugin", plugin)]
    result = run(
        "launch", "--recipe", LARGE, *SLURM, *data, "--use-bitnet", *plugins, "--dry-run", "train.train_iters=9"
    )
    assert result.exit_code == 0, result.stderr
    for text in (
        f"train --recipe {LARGE} --dataset /data/web:0.7 --dataset /data/code:0.3 --hf-path /data/hf --use-bitnet "
        "train.train_iters=9 train.exit_signal_handler=True",
        "#SBATCH --signal=TERM@90",
        "nsys profile -s none -t cuda",
        "profiling.profile_step_start=5 profiling.profile_step_end=7",
    ):
        assert text in result.stdout, result.stdout
    adapters = ["--recipe", "falcon_h1_7b_peft_config", "--peft-scheme", "dora", "--dataset", "/data/chats"]
    result = run("launch", *adapters, "--hf-path", "tiiuae/x", *SLURM, "--no-check-files", "--dry-run")
    assert "--dataset /data/chats --hf-path tiiuae/x --peft-scheme dora" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("sbatch", "status", "text"),
    [("echo 4242", 0, ""), ("echo 'sbatch: error: invalid partition' >&2; exit 1", 1, "invalid partition")],
)
def test_submitted_to_slurm(run, tmp_path, monkeypatch, sbatch, status, text):
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "sbatch").write_text(f'#!/bin/bash\nfor script; do :; done\nbash -n "$script" || exit 9\n{sbatch}\n')
    (fakes / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fakes}:{os.environ['PATH']}")
    result = run("launch", "--recipe", LARGE, *SLURM, "--json")
    assert result.exit_code == status, result.stderr
    found = json.loads(result.stdout)
    if status:
        assert text in _line(result) and "Slurm refused the job" in found["error"]
    else:
        assert found["job_id"] == "4242" and list(Path(found["job_dir"]).glob("*_sbatch.sh"))
        assert Path(found["job_dir"]).is_relative_to(tmp_path / "nemo_run")


def test_two_ranks_train_on_this_machine(run, tmp_path):
    args = ["--executor", "local", "--nproc", "2", "--env", "OMP_NUM_THREADS=1", "--plugin", "preemption", "--json"]
    result = run("launch", "--recipe", TINY, *args, "--use-bitnet", *SMALL, "model.mlp_multipliers=[0.5,0.25]")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["state"] == "SUCCEEDED"
    log = Path(found["log"]).read_text()
    losses = [float(text) for text in re.findall(r"iteration +\d+/ +3 .*lm loss: ([\d.E+-]+)", log)]
    assert len(losses) == 3 and all(6 < loss < 8 for loss in losses)
    (summary,) = re.findall(r"steps 1 to 3: loss ([\d.]+) → ([\d.]+) in", log)
    assert [float(loss) for loss in summary] == pytest.approx([losses[0], losses[2]], abs=1e-4)
    checkpoints = tmp_path / "nemo_experiments" / "falcon_h1_tiny_cpu" / "checkpoints"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    assert {path.name for path in tmp_path.iterdir()} == {"nemo_run", "nemo_experiments"}


def test_two_ranks_fine_tune_on_this_machine(run, chats, tmp_path):  # noqa: F811
    """The first loss is that of each conversation alone, of the Hugging Face checkpoint, in transformers."""
    args = ["--executor", "local", "--env", "OMP_NUM_THREADS=1", "--dataset", chats.data, "--hf-path", chats.hf]
    layout = ["model.tensor_model_parallel_size=2", f"train.global_batch_size={chats.rows}", "optimizer.lr=2e-2"]
    length = ["train.train_iters=6", "validation.eval_iters=0"]
    result = run("launch", "--recipe", "falcon_h1_tiny_cpu_sft_config", *args, "--json", *layout, *length)
    assert result.exit_code == 0, result.stderr
    log = Path(json.loads(result.stdout)["log"]).read_text()
    losses = [float(text) for text in re.findall(r"iteration +\d+/ +6 .*lm loss: ([\d.E+-]+)", log)]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(chats.loss(AutoModelForCausalLM.from_pretrained(chats.hf)), rel=1e-5)
    assert losses[-1] < losses[0] - 0.2


def test_a_failing_rank_fails_the_launch(run, monkeypatch):
    from falcon_bridge.recipes import launch

    def of_another_version(recipe, overrides, **options):
        return real("falcon_h1_newer_pretrain_config", overrides, **options)

    real = launch.task
    monkeypatch.setattr(launch, "task", of_another_version)
    result = run("launch", "--recipe", TINY, "--executor", "local", "--json", *SMALL)
    assert result.exit_code == 1
    message = json.loads(result.stdout)["error"]
    assert message.startswith("the job failed: unknown recipe 'falcon_h1_newer_pretrain_config'")
    log = Path(re.search(r"its log is (\S+)", message)[1])
    assert "unknown recipe" in log.read_text() and message in _line(result)


def test_an_interrupt_ends_the_ranks(run, tmp_path, monkeypatch):
    from falcon_bridge.recipes import launch

    pid_file = tmp_path / "pid"
    (tmp_path / "stand_in.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(
        launch, "task", lambda *args, **kwargs: launch.nemo_run().Script(path="stand_in", m=True, entrypoint="python")
    )

    def interrupt():
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    before = signal.getsignal(signal.SIGINT)
    result = run("launch", "--recipe", TINY, "--executor", "local")
    thread.join()
    assert result.exit_code == 130 and _line(result) == "error: interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert signal.getsignal(signal.SIGINT) == before
