"""The verb ``launch``: a recipe through NeMo-Run, on this machine or on a Slurm cluster."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from falcon_bridge.cli.devices import cpu_only
from falcon_bridge.cli.launch_options import check_options, pairs
from falcon_bridge.cli.plugins import PLUGINS, make_plugins
from falcon_bridge.cli.run_options import (
    DatasetOption,
    HFPathOption,
    Overrides,
    PeftSchemeOption,
    RecipeOption,
    UseBitnetOption,
)
from falcon_bridge.cli.session import DebugOption, JsonOption, Session, session
from falcon_bridge.errors import JobError


_QUIET = {"clean_mode": True, "enable_goodbye_message": False, "skip_status_at_exit": True, "log_level": "WARN"}


def launch(
    recipe: RecipeOption,
    executor: Annotated[str, typer.Option(help="Where it runs: local or slurm.")],
    overrides: Overrides = None,
    dataset: DatasetOption = None,
    hf_path: HFPathOption = None,
    use_bitnet: UseBitnetOption = False,
    peft_scheme: PeftSchemeOption = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[.KEY=VALUE]",
            help=f"Run plugin of Megatron Bridge, and its values: {', '.join(PLUGINS)}.",
        ),
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
    check_files: Annotated[
        bool | None,
        typer.Option(
            "--check-files/--no-check-files",
            help="slurm: whether the job's data and checkpoint are to be looked for here first; by default without "
            "--container-image and --ssh-host.",
            show_default=False,
        ),
    ] = None,
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
    variables, parameters = pairs("--env", env), pairs("--sbatch", sbatch)
    check_options(executor, given)
    training = {"dataset": dataset, "hf_path": hf_path, "use_bitnet": use_bitnet, "peft_scheme": peft_scheme}
    job = {"name": name, "job_dir": None if ssh_host else job_dir, **training}
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
    with session(json, debug, keep_logs=executor == "local" and not dry_run) as current:
        with current.status("importing Megatron and NeMo-Run, up to 40 s"):
            library = _library(job["job_dir"])
            job["plugins"] = make_plugins(plugin or [])
            if executor == "local":
                job["executor"] = library.local_executor(
                    _ranks(recipe, overrides or [], training, processes), variables
                )
            else:
                job["executor"] = library.slurm_executor(**slurm)
                job["check_files"] = check_files
            text = library.render(recipe, overrides or [], **job) if dry_run else None
        if dry_run:
            current.finish({"ok": True, "executor": executor, "command" if executor == "local" else "script": text})
        elif executor == "local":
            _run_here(current, library.experiment(recipe, overrides or [], **job, **_QUIET))
        else:
            _submit(current, library.experiment(recipe, overrides or [], **job, **_QUIET))
    if text and not json:
        typer.echo(text)  # as it is: a script must not be wrapped


def _ranks(recipe: str, overrides: list[str], training: dict[str, Any], processes: int | None) -> int:
    """How many ranks a local job has."""
    from falcon_bridge.training.run import configure, world_size

    cfg = configure(recipe, overrides, **training)
    with cpu_only() if "cpu" in recipe.split("_") else contextlib.nullcontext():
        return world_size(cfg, processes)


def _run_here(current: Session, experiment: AbstractContextManager[Any]) -> None:
    """Run a local job to its end."""
    with _signals_kept(), experiment as exp:
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


def _submit(current: Session, experiment: AbstractContextManager[Any]) -> None:
    """Hand a job to Slurm."""
    from invoke.exceptions import UnexpectedExit

    try:
        with _signals_kept(), experiment as exp:
            (launched,) = exp.jobs
            exp.run(detach=True)
    except UnexpectedExit as error:
        said = (error.result.stderr or error.result.stdout).strip() or f"status {error.result.exited}"
        raise JobError(f"Slurm refused the job: {' '.join(said.split())}") from error
    number = launched.handle.rpartition("/")[2]
    folder = launched.executor.tunnel.job_dir
    current.show(f"submitted Slurm job {number}; script and logs are in {folder}")
    current.finish({"ok": True, "executor": "slurm", "job_id": number, "job_dir": folder})


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
