"""A Megatron (torch_dist) checkpoint directory: its iterations, and the Hugging Face files kept beside them."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from falcon_bridge.errors import UserError


HF_SOURCE_NAME = "hf_source"
_DTYPES_NAME = "falcon_bridge.dtypes.json"


@dataclass(frozen=True)
class MegatronCheckpoint:
    """One iteration of a Megatron checkpoint.

    Attributes:
        root: the directory that was given, or the one above a given ``iter_*``.
        iteration_dir: the directory with run_config.yaml and the shards.
        iteration: its number.
        hf_source: the directory of Hugging Face files (config.json, tokenizer) it came from, or None.
    """

    root: Path
    iteration_dir: Path
    iteration: int
    hf_source: Path | None


def find_megatron_checkpoint(path: str | Path) -> MegatronCheckpoint:
    """The latest iteration of a checkpoint directory, or the one that an ``iter_*`` directory is.

    Raises:
        UserError: there is none, or it is unfinished.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is no directory: give a Megatron checkpoint, as `convert import` or `train` writes it"
        )
    if path.name.startswith("iter_"):
        root, iteration_dir = path.parent, path
    else:
        root, iteration_dir = path, path / f"iter_{_latest(path):07d}"
    if not iteration_dir.is_dir():
        raise UserError(f"{root} names iteration {iteration_dir.name}, which is not there: it is incomplete")
    for name in ("run_config.yaml", ".metadata"):
        if not (iteration_dir / name).is_file():
            raise UserError(f"{iteration_dir} has no {name}: it is no finished Megatron Bridge checkpoint")
    hf_source = root / HF_SOURCE_NAME
    number = iteration_dir.name.removeprefix("iter_")
    return MegatronCheckpoint(
        root, iteration_dir, int(number) if number.isdigit() else 0, hf_source if hf_source.is_dir() else None
    )


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Whether `path` looks like a Megatron checkpoint rather than a Hugging Face one."""
    path = Path(path)
    return (path / "latest_checkpointed_iteration.txt").is_file() or (path / "run_config.yaml").is_file()


def keep_hf_source(root: Path, files: Iterable[Path], dtypes: dict[str, str]) -> Path:
    """Copy Hugging Face files beside a Megatron checkpoint, so that exporting needs nothing else.

    Args:
        root: the Megatron checkpoint's directory.
        files: config.json, tokenizer and so on.
        dtypes: safetensors dtype of each tensor of the source, restored by an export.
    """
    directory = root / HF_SOURCE_NAME
    directory.mkdir()
    for file in files:
        shutil.copyfile(file, directory / file.name)
    (directory / _DTYPES_NAME).write_text(json.dumps(dtypes, indent=1) + "\n")
    return directory


def copy_hf_source(source: Path, root: Path) -> None:
    """Hand the Hugging Face files of one Megatron checkpoint directory on to another, unless it has them already."""
    target = root / HF_SOURCE_NAME
    if source.is_dir() and not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target)


def source_dtypes(hf_source: Path | None) -> dict[str, str]:
    """The safetensors dtypes that `keep_hf_source` recorded; empty where there are none."""
    path = hf_source / _DTYPES_NAME if hf_source else None
    return json.loads(path.read_text()) if path and path.is_file() else {}


def source_files(hf_source: Path) -> list[Path]:
    """The Hugging Face files that an export restores."""
    return sorted(path for path in hf_source.iterdir() if path.name != _DTYPES_NAME)


def _latest(path: Path) -> int:
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        hint = " (it is a Hugging Face checkpoint: use `convert import`)" if (path / "config.json").is_file() else ""
        raise UserError(f"{path} is not a Megatron checkpoint: it has no latest_checkpointed_iteration.txt{hint}")
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise UserError(f"{tracker} holds {text!r} instead of an iteration number: the checkpoint is damaged")
    return int(text)
