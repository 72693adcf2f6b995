"""Recipes on a cluster, through NeMo-Run: a recipe's name, overrides and the user's own executor make an experiment.

    import nemo_run as run
    from falcon_bridge.recipes.launch import experiment

    executor = run.SlurmExecutor(account="research", partition="gpu", nodes=2, gpus_per_node=8, ...)
    with experiment("falcon_h1_7b_pretrain_config", ["train.train_iters=1000"], executor=executor) as exp:
        exp.run(detach=True)

The job is ``torchrun -m falcon_bridge train …``: where it runs, the installed package is all it needs. NeMo-Run takes
5 s to import, and is imported when a function of this module is called.
"""

import contextlib
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from falcon_bridge.errors import UserError
from falcon_bridge.recipes._nemo_run import adapt, nemo_run, prepared, sees_this_machine
from falcon_bridge.recipes._preflight import as_list, check_job


def task(
    recipe: str,
    overrides: Iterable[str] = (),
    *,
    dataset: str | Path | Iterable[str | Path] | None = None,
    hf_path: str | None = None,
    use_bitnet: bool = False,
    peft_scheme: str | None = None,
) -> Any:
    """The job of a recipe: a ``run.Script`` that is ``python -m falcon_bridge train --recipe …``.

    Bridge's run plugins append their overrides to its ``args``.

    Args:
        recipe: name of a recipe of `falcon_bridge.recipes`.
        overrides: ``key.sub=value`` in Hydra's syntax.
        dataset: what to train on, one or several, as ``train --dataset`` takes them and as the job sees them.
        hf_path: Hugging Face checkpoint to start from, as the job sees it.
        use_bitnet: make the linear layers ternary.
        peft_scheme: adapters of a peft recipe, "lora" or "dora".

    Returns:
        A ``run.Script``; run it with torchrun, one process a rank. `experiment` sees to that.
    """
    options = ["train", "--recipe", recipe]
    for path in as_list(dataset):
        options += ["--dataset", path]
    if hf_path is not None:
        options += ["--hf-path", str(hf_path)]
    if use_bitnet:
        options.append("--use-bitnet")
    if peft_scheme is not None:
        options += ["--peft-scheme", peft_scheme]
    return nemo_run().Script(path="falcon_bridge", m=True, entrypoint="python", args=[*options, *overrides])


def local_executor(processes: int, env: Mapping[str, str] | None = None) -> Any:
    """A ``run.LocalExecutor``: `processes` ranks on this machine.

    Args:
        processes: number of ranks.
        env: environment variables of the job, on top of this process's.
    """
    return nemo_run().LocalExecutor(ntasks_per_node=processes, env_vars=dict(env or {}))


def slurm_executor(
    *,
    account: str,
    partition: str,
    nodes: int = 1,
    gpus_per_node: int = 8,
    time: str = "01:00:00",
    container_image: str | None = None,
    container_mounts: Iterable[str] = (),
    env: Mapping[str, str] | None = None,
    setup: Iterable[str] = (),
    sbatch: Mapping[str, str] | None = None,
    ssh_host: str | None = None,
    ssh_user: str | None = None,
    ssh_identity: str | None = None,
    remote_job_dir: str | None = None,
) -> Any:
    """A ``run.SlurmExecutor`` that needs no checkout: torchrun on every node, one rank a GPU, nothing packaged.

    Args:
        account: Slurm account.
        partition: Slurm partition.
        nodes: number of nodes.
        gpus_per_node: GPUs, and ranks, of each.
        time: limit, ``[days-]hours:minutes:seconds``.
        container_image: image that Pyxis runs; without one the job runs in the environment that submits it.
        container_mounts: ``source:target`` each.
        env: environment variables of the job; values are quoted here, so that the shell takes them as they are.
        setup: shell lines before the job, such as ``source /shared/venv/bin/activate``.
        sbatch: further parameters of sbatch, such as ``{"qos": "high"}``.
        ssh_host: submit through this host; None submits here.
        ssh_user: user there.
        ssh_identity: private key file.
        remote_job_dir: where the job's files go on `ssh_host`.

    Raises:
        UserError: an environment variable's name has lower case letters: NeMo-Run writes them in upper case.
    """
    run = nemo_run()
    env = dict(env or {})
    for name in env:
        if name != name.upper():
            raise UserError(f"NeMo-Run writes environment variables in upper case on Slurm: '{name}' cannot be set")
    if ssh_host is None:
        tunnel = run.LocalTunnel(job_dir="")  # `experiment` sets it
    else:
        tunnel = run.SSHTunnel(host=ssh_host, user=ssh_user, identity=ssh_identity, job_dir=remote_job_dir)
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        nodes=nodes,
        ntasks_per_node=gpus_per_node,
        gpus_per_node=gpus_per_node,
        time=time,
        container_image=container_image,
        container_mounts=list(container_mounts),
        # Pyxis would otherwise let the image's own values win
        container_env=sorted(env) if container_image and env else None,
        env_vars={name: shlex.quote(value) for name, value in env.items()},
        setup_lines="\n".join(setup) or None,
        additional_parameters=dict(sbatch) if sbatch else None,
        tunnel=tunnel,
        packager=run.Packager(),
        launcher="torchrun",
        poll_estimated_start_time=False,
    )


@contextlib.contextmanager
def experiment(
    recipe: str,
    overrides: Iterable[str] = (),
    *,
    executor: Any,
    plugins: Iterable[Any] = (),
    name: str | None = None,
    job_dir: str | Path | None = None,
    dataset: str | Path | Iterable[str | Path] | None = None,
    hf_path: str | None = None,
    use_bitnet: bool = False,
    peft_scheme: str | None = None,
    check_files: bool | None = None,
    **options: Any,
) -> Iterator[Any]:
    """A NeMo-Run experiment with one job: the recipe on `executor`.

    The recipe, the overrides (those of plugins too), the number of ranks, and data and checkpoint are checked here,
    before anything is written or submitted. Use it as NeMo-Run's own: ``with experiment(...) as exp: exp.run()``.

    Args:
        recipe: name of a recipe of `falcon_bridge.recipes`.
        overrides: ``key.sub=value`` in Hydra's syntax.
        executor: any executor of NeMo-Run (Local, Slurm, Docker, Kubeflow, Skypilot …). It is copied. Where it has no
            launcher it gets torchrun; on Slurm one rank a GPU.
        plugins: of ``megatron.bridge.recipes.run_plugins``, or your own.
        name: of the experiment and its job; the recipe's without ``_config`` where None.
        job_dir: where NeMo-Run keeps the experiment; where None ``$NEMORUN_HOME`` or ``nemo_run`` in this directory.
        dataset: as of `task`.
        hf_path: as of `task`.
        use_bitnet: as of `task`.
        peft_scheme: as of `task`.
        check_files: whether the job's files are on this machine and are to be checked; where None they are where
            the job runs here, or on Slurm without a container and without ssh.
        **options: further ones of ``run.Experiment``.

    Yields:
        The ``run.Experiment``, entered.

    Raises:
        UserError: an unknown recipe or override, fewer ranks than the layout, data or checkpoint that cannot be
            trained on, a fine-tuning without them, NeMo-Run is missing, or a launcher that starts no ranks.
    """
    base = Path(job_dir or default_job_dir()).absolute()
    training = {"dataset": as_list(dataset), "hf_path": hf_path, "use_bitnet": use_bitnet, "peft_scheme": peft_scheme}
    job = {"executor": executor, "plugins": plugins, "name": name, "check_files": check_files, **training}
    with _experiment(base, base / "experiments", options, recipe, overrides, **job) as entered:
        yield entered


def default_job_dir() -> Path:
    """``$NEMORUN_HOME``, or ``nemo_run`` in the current directory."""
    return Path(os.environ.get("NEMORUN_HOME") or "nemo_run").absolute()


def render(
    recipe: str, overrides: Iterable[str] = (), *, executor: Any, job_dir: str | Path | None = None, **job: Any
) -> str:
    """What `experiment` would submit to a Local or Slurm executor; nothing is submitted and nothing stays on disk.

    Args:
        recipe: name of a recipe of `falcon_bridge.recipes`.
        overrides: ``key.sub=value`` in Hydra's syntax.
        executor: a ``run.LocalExecutor`` or ``run.SlurmExecutor``.
        job_dir: as of `experiment`.
        **job: of `experiment`: `plugins`, `name`, `dataset`, `hf_path`, `use_bitnet`, `peft_scheme`, `check_files`.

    Returns:
        The sbatch script, or the command of the local job.

    Raises:
        UserError: as `experiment`.
    """
    job_files = Path(job_dir or default_job_dir()).absolute() / "experiments"
    quiet = {"clean_mode": True, "enable_goodbye_message": False, "log_level": "WARN"}
    with (
        tempfile.TemporaryDirectory(prefix="falcon_bridge_launch_") as base,
        _experiment(Path(base), job_files, quiet, recipe, overrides, executor=executor, **job) as exp,
    ):
        if isinstance(executor, nemo_run().LocalExecutor):
            return shlex.join(exp.jobs[0].task.to_command(with_entrypoint=True))
        exp.dryrun(log=False, delete_exp_dir=False)
        (script,) = Path(base).rglob("*_sbatch.sh")
        return script.read_text()


@contextlib.contextmanager
def _experiment(
    base: Path,
    job_files: Path,
    options: dict[str, Any],
    recipe: str,
    overrides: Iterable[str],
    *,
    executor: Any,
    plugins: Iterable[Any] = (),
    name: str | None = None,
    check_files: bool | None = None,
    **training: Any,
) -> Iterator[Any]:
    """The experiment with its files under `base`, and those of a job submitted on this machine under `job_files`."""
    from falcon_bridge.training.recipe import load_recipe

    overrides = list(overrides)
    training = {"hf_path": None, **training, "dataset": as_list(training.get("dataset"))}
    load_recipe(recipe)  # an unknown one is refused before seconds go into imports
    run = nemo_run()
    name = name or recipe.removesuffix("_config")
    script = task(recipe, overrides, **training)
    options_end = len(script.args) - len(overrides)
    executor = prepared(run, executor, job_files)
    with run.Experiment(name, base_dir=str(base), **options) as exp:
        here = isinstance(executor, run.LocalExecutor)
        # the name of a local job is the prefix of its log lines, that of a Slurm job is seen in the queue
        exp.add(script, executor=executor, name="train" if here else name, plugins=list(plugins))
        job = exp.jobs[-1]
        job.executor.get_launcher()
        # the plugins have added theirs
        added, ranks = job.task.args[options_end:], job.executor.nnodes() * job.executor.nproc_per_node()
        files = sees_this_machine(run, executor) if check_files is None else check_files
        check_job(recipe, added, ranks, here=here, files=here or files, **training)
        adapt(run, job)
        yield exp
