"""The verb ``launch``: a recipe through NeMo-Run, on this machine or on a Slurm cluster."""

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from falcon_bridge.cli.devices import cpu_only
from falcon_bridge.cli.session import DebugOption, JsonOption, Session, session
from falcon_bridge.errors import JobError, UserError, suggestion


_EXECUTORS = ("local", "slurm")
_QUIET = {"clean_mode": True, "enable_goodbye_message": False, "skip_status_at_exit": True, "log_level": "WARN"}
_SLURM_ONLY = {
    "account": "--account",
    "partition": "--partition",
    "nodes": "--nodes",
    "gpus_per_node": "--gpus-per-node",
    "time": "--time",
    "container_image": "--container-image",
    "container_mounts": "--container-mounts",
    "setup": "--setup",
    "sbatch": "--sbatch",
    "ssh_host": "--ssh-host",
    "ssh_user": "--ssh-user",
    "ssh_identity": "--ssh-identity",
}


def launch(
    recipe: Annotated[str, typer.Option(help="Name of the recipe; `falcon-bridge recipes` lists them.")],
    executor: Annotated[str, typer.Option(help="Where it runs: local or slurm.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides of the recipe, in Hydra's syntax."),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Indexed dataset to train on: the prefix of its .bin and .idx.")
    ] = None,
    hf_path: Annotated[
        str | None, typer.Option("--hf-path", metavar="HF", help="Start from this Hugging Face checkpoint.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Environment variable of the job.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the experiment; the recipe's if not given.")] = None,
    job_dir: Annotated[
        Path | None,
        typer.Option(help="Where job scripts and logs go: ./nemo_run; with --ssh-host, a directory there."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--nproc", min=1, help="local: ranks; all GPUs, or on CPU what the layout takes.")
    ] = None,
    account: Annotated[str | None, typer.Option(help="slurm: account.")] = None,
    partition: Annotated[str | None, typer.Option(help="slurm: partition.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="slurm: nodes; 1 if not given.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="slurm: GPUs of a node; 8 if not given.")] = None,
    time: Annotated[str | None, typer.Option(help="slurm: limit, [days-]hh:mm:ss; an hour if not given.")] = None,
    container_image: Annotated[str | None, typer.Option(help="slurm: container image, for Pyxis.")] = None,
    container_mounts: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE:TARGET[,…]", help="slurm: mounts of the container.")
    ] = None,
    setup: Annotated[
        list[str] | None, typer.Option(metavar="LINE", help="slurm: shell line before the job, to enter a venv.")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="slurm: further parameter of sbatch, as in qos=high.")
    ] = None,
    ssh_host: Annotated[str | None, typer.Option(help="slurm: submit through this host instead of here.")] = None,
    ssh_user: Annotated[str | None, typer.Option(help="slurm: user on that host.")] = None,
    ssh_identity: Annotated[str | None, typer.Option(help="slurm: private key file for that host.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the sbatch script, or the local command; run nothing.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run `train` of a recipe through NeMo-Run: torchrun on this machine, or a Slurm job.

    The job needs the installed package, and no checkout. A local job is waited for and its log goes to stderr; a Slurm
    job is submitted.

    [bold]Examples[/bold]

    falcon-bridge launch --recipe falcon_h1_tiny_cpu_pretrain_config --executor local --nproc 2
    train.micro_batch_size=4 train.train_iters=20

    falcon-bridge launch --recipe falcon_h1_7b_pretrain_config --executor slurm --account research --partition gpu
    --nodes 4 --gpus-per-node 8 --time 04:00:00 --container-image /images/nemo.sqsh
    --container-mounts /data:/data --env HF_HOME=/data/hf --dataset /data/corpus --dry-run
    """
    given = locals()
    variables, parameters = _pairs("--env", env), _pairs("--sbatch", sbatch)
    _check_options(executor, given)
    job = {"name": name, "dataset": dataset, "hf_path": hf_path}
    slurm = {
        "account": account,
        "partition": partition,
        "container_image": container_image,
        "container_mounts": [mount for mounts in container_mounts or [] for mount in mounts.split(",")],
        "env": variables,
        "setup": setup or [],
        "sbatch": {key.replace("-", "_"): value for key, value in parameters.items()},
        "ssh_host": ssh_host,
        "ssh_user": ssh_user,
        "ssh_identity": ssh_identity,
        "remote_job_dir": str(job_dir) if ssh_host else None,
        **{key: value for key, value in (("nodes", nodes), ("gpus_per_node", gpus_per_node), ("time", time)) if value},
    }
    here = None if ssh_host else job_dir
    with session(json, debug, keep_logs=executor == "local" and not dry_run) as current:
        if executor == "local":
            text = _local(current, recipe, overrides or [], processes, slurm["env"], here, job, dry_run)
        else:
            text = _slurm(current, recipe, overrides or [], slurm, here, job, dry_run)
    if text and not json:
        typer.echo(text)  # as it is: a script must not be wrapped


def _check_options(executor: str, given: dict[str, Any]) -> None:
    if executor not in _EXECUTORS:
        hint = suggestion(executor, _EXECUTORS) or ": use local or slurm, or your own executor from Python"
        raise UserError(f"unknown executor '{executor}'{hint}")
    if executor == "local":
        foreign = [option for key, option in _SLURM_ONLY.items() if given[key]]
        if foreign:
            raise UserError(f"{', '.join(foreign)} need --executor slurm")
        return
    if given["processes"]:
        raise UserError("--nproc is for --executor local: give --nodes and --gpus-per-node")
    missing = [option for option in ("account", "partition") if not given[option]]
    if missing:
        raise UserError(f"--executor slurm needs {' and '.join('--' + option for option in missing)}")
    if given["container_mounts"] and not given["container_image"]:
        raise UserError("--container-mounts needs --container-image")
    if given["ssh_host"]:
        if not given["ssh_user"]:
            raise UserError("--ssh-host needs --ssh-user")
        if not given["job_dir"] or not given["job_dir"].is_absolute():
            raise UserError("--ssh-host needs --job-dir, an absolute directory on that host")
    elif given["ssh_user"] or given["ssh_identity"]:
        raise UserError("--ssh-user and --ssh-identity need --ssh-host")
    elif not given["dry_run"] and shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit from a login node or with --ssh-host, or use --dry-run")


def _pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or []:
        key, separator, value = text.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_][\w-]*", key):
            raise UserError(f"{option} '{text}': write KEY=VALUE")
        pairs[key] = value
    return pairs


def _local(
    current: Session,
    recipe: str,
    overrides: list[str],
    processes: int | None,
    env: dict[str, str],
    job_dir: Path | None,
    job: dict[str, Any],
    dry_run: bool,
) -> str | None:
    with current.status("importing Megatron and NeMo-Run, up to 40 s"):
        launch = _library(job_dir)
        from falcon_bridge.training.run import configure, world_size

        cfg = configure(recipe, overrides, job["dataset"], job["hf_path"])
        with cpu_only() if "cpu" in recipe.split("_") else contextlib.nullcontext():
            executor = launch.local_executor(world_size(cfg, processes), env)
    if dry_run:
        command = launch.render(recipe, overrides, executor=executor, job_dir=job_dir, **job)
        current.finish({"ok": True, "executor": "local", "command": command})
        return command
    quiet = {"clean_mode": True, "enable_goodbye_message": False, "skip_status_at_exit": True, "log_level": "WARN"}
    with (
        _signals_kept(),
        launch.experiment(recipe, overrides, executor=executor, job_dir=job_dir, **job, **quiet) as exp,
    ):
        (launched,) = exp.jobs
        exp.run(tail_logs=True)
        interrupted = _cancel_on_signal(exp, launched.id)
    files = Path(launched.executor.job_dir)
    log = next(files.rglob("combined.log"), files)
    if interrupted:
        raise KeyboardInterrupt
    if launched.state.name != "SUCCEEDED":
        raise JobError(f"the job failed: {_first_error(log)}; its log is {log}")
    current.show(f"the job succeeded; its log is {log}")
    current.finish({"ok": True, "executor": "local", "state": launched.state.name, "log": str(log)})
    return None


def _slurm(
    current: Session,
    recipe: str,
    overrides: list[str],
    slurm: dict[str, Any],
    job_dir: Path | None,
    job: dict[str, Any],
    dry_run: bool,
) -> str | None:
    with current.status("importing Megatron and NeMo-Run, up to 40 s"):
        launch = _library(job_dir)
        executor = launch.slurm_executor(**slurm)
        if dry_run:
            script = launch.render(recipe, overrides, executor=executor, job_dir=job_dir, **job)
    if dry_run:
        current.finish({"ok": True, "executor": "slurm", "script": script})
        return script
    from invoke.exceptions import UnexpectedExit

    options = {"executor": executor, "job_dir": job_dir, **job, **_QUIET}
    try:
        with _signals_kept(), launch.experiment(recipe, overrides, **options) as exp:
            (launched,) = exp.jobs
            exp.run(detach=True)
    except UnexpectedExit as error:
        said = (error.result.stderr or error.result.stdout).strip() or f"status {error.result.exited}"
        raise JobError(f"Slurm refused the job: {' '.join(said.split())}") from error
    number = launched.handle.rpartition("/")[2]
    folder = launched.executor.tunnel.job_dir
    current.show(f"submitted Slurm job {number}; script and logs are in {folder}")
    current.finish({"ok": True, "executor": "slurm", "job_id": number, "job_dir": folder})
    return None


def _library(job_dir: Path | None) -> Any:
    """The launch library; NeMo-Run, which reads where to keep its own files once, keeps them with the job's."""
    from falcon_bridge.recipes import launch

    os.environ["NEMORUN_HOME"] = str((job_dir or launch.default_job_dir()).absolute())
    return launch


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo the handlers that torchx sets for the whole process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cancel_on_signal(exp: Any, job_id: str) -> list[int]:
    """End the job on SIGINT or SIGTERM; its ranks are in a session of their own. The list tells whether one came."""
    came: list[int] = []

    def cancel(number: int, frame: Any) -> None:
        if not came:
            came.append(number)
            exp.cancel(job_id)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, cancel)
    return came


def _first_error(log: Path) -> str:
    """The first error line of a rank, without torchrun's prefix."""
    if log.is_file():
        for line in log.read_text(errors="replace").splitlines():
            found = re.match(r"(?:\[\w+\]:)?error: (.*)", line)
            if found:
                return found[1]
    return "no rank said why"
