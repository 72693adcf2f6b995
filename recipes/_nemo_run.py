"""What NeMo-Run 0.11.1 needs so that a recipe starts one rank a GPU and gets its arguments as they are."""

import dataclasses
import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from falcon_bridge.errors import UserError, one_line


def nemo_run() -> ModuleType:
    """The package ``nemo_run``.

    Raises:
        UserError: it is not installed, or does not import (a leptonai from 0.47 on, or one without its fastapi).
    """
    if importlib.util.find_spec("nemo_run") is None:
        raise UserError("launching needs NeMo-Run: pip install falcon-bridge[recipes]")
    try:
        import nemo_run
    except ImportError as error:
        raise UserError(
            f'NeMo-Run does not import ({one_line(error)}): pip install "leptonai<0.47" fastapi'
        ) from error
    return nemo_run


def prepared(run: ModuleType, executor: Any, job_files: Path) -> Any:
    """A copy of the user's `executor` that starts one rank a GPU."""
    executor = executor.clone()
    if executor.launcher is None and not isinstance(executor, run.LocalExecutor):
        executor.launcher = "torchrun"
    if isinstance(executor, run.SlurmExecutor):
        if executor.torchrun_nproc_per_node is None and executor.ntasks_per_node == 1:
            # NeMo-Run takes the one task of the node for its one rank
            executor.torchrun_nproc_per_node = executor.gpus_per_node or executor.gpus_per_task
        if isinstance(executor.tunnel, run.LocalTunnel):
            # where the experiment writes the script is where sbatch looks for it
            executor.tunnel.job_dir = str(job_files)
    return executor


def sees_this_machine(run: ModuleType, executor: Any) -> bool:
    """Whether a job of `executor` finds this machine's files: it runs here, or on a cluster that this is a node of."""
    if isinstance(executor, run.SlurmExecutor):
        return isinstance(executor.tunnel, run.LocalTunnel) and not executor.container_image
    return isinstance(executor, run.LocalExecutor)


def adapt(run: ModuleType, job: Any) -> None:
    """Give the job of an experiment, its plugins applied, a form in which every argument arrives as it is."""
    from nemo_run.core.execution.launcher import FaultTolerance, Launcher, SlurmTemplate, Torchrun

    executor, script = job.executor, job.task
    launcher = executor.get_launcher()
    if isinstance(executor, run.LocalExecutor) and executor.nodes == 1 and not isinstance(launcher, FaultTolerance):
        # NeMo-Run's torchrun quotes arguments for a shell, and its local executor has none
        processes = ["--standalone", "--nproc-per-node", str(executor.nproc_per_node()), "--tee", "3"]
        script.args = [*processes, "-m", script.path, *script.args]
        script.path, script.entrypoint = "torch.distributed.run", sys.executable
        plain = {field.name: getattr(launcher, field.name) for field in dataclasses.fields(Launcher)}
        executor.launcher = Launcher(**plain)
    elif isinstance(executor, run.LocalExecutor):
        quoted = [arg for arg in script.args if shlex.quote(arg) != arg]
        if quoted:
            raise UserError(
                f"NeMo-Run's local executor passes {quoted[0]} on with quotes under this launcher: use one node and "
                "torchrun, or an override without special characters"
            )
    elif isinstance(launcher, SlurmTemplate):
        script.args = [shlex.quote(arg) for arg in script.args]
    elif not isinstance(launcher, Torchrun | FaultTolerance):
        raise UserError(
            f"the launcher {type(launcher).__name__} starts no ranks: leave the executor's launcher unset, or set "
            "it to 'torchrun'"
        )
