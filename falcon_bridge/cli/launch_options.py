"""What of ``launch``'s options fits together."""

import re
import shutil
from typing import Any

from falcon_bridge.errors import UserError, suggestion


_EXECUTORS = ("local", "slurm")
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
    "check_files": "--check-files",
}


def check_options(executor: str, given: dict[str, Any]) -> None:
    """Refuse options that do not fit the executor or each other.

    Args:
        executor: as given.
        given: value of each parameter of `launch.launch`.

    Raises:
        UserError: the message names the options.
    """
    if executor not in _EXECUTORS:
        hint = suggestion(executor, _EXECUTORS) or ": use local or slurm, or your own executor from Python"
        raise UserError(f"unknown executor '{executor}'{hint}")
    if executor == "local":
        foreign = [option for key, option in _SLURM_ONLY.items() if given[key] not in (None, [])]
        if foreign:
            raise UserError(f"{', '.join(foreign)} need --executor slurm")
        if any(text.split(".")[0] == "fault_tolerance" for text in given["plugin"] or []):
            raise UserError("--plugin fault_tolerance needs --executor slurm")
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


def pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    """``KEY=VALUE`` texts as a dictionary.

    Args:
        option: that has them, for the error.
        texts: as given.

    Raises:
        UserError: one is not ``KEY=VALUE``.
    """
    found = {}
    for text in texts or []:
        key, separator, value = text.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_][\w-]*", key):
            raise UserError(f"{option} '{text}': write KEY=VALUE")
        found[key] = value
    return found
