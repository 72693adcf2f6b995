"""A Megatron (torch_dist) checkpoint directory: its iterations, and the Hugging Face files kept beside them."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from falcon_bridge.conversion.atomic import atomic_directory
from falcon_bridge.conversion.bitnet_config import has_packed_weights
from falcon_bridge.errors import FalconBridgeError, UserError, one_line


HF_SOURCE_NAME = "hf_source"
_DTYPES_NAME = "falcon_bridge.dtypes.json"
_FORM_NAME = "falcon_bridge.form.json"


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
        root, iteration_dir, int(number) if _is_number(number) else 0, hf_source if hf_source.is_dir() else None
    )


@contextlib.contextmanager
def reading_shards(iteration_dir: Path) -> Iterator[None]:
    """Say of what fails in the block that `iteration_dir` is damaged; for the loading of its shards.

    Raises:
        UserError: anything failed but for lack of memory.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException  # not an Exception

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, FalconBridgeError):
        raise
    except (Exception, CheckpointException) as error:
        raise UserError(f"{iteration_dir} is damaged or incomplete ({one_line(error)}): convert again") from error


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Whether `path` looks like a Megatron checkpoint rather than a Hugging Face one."""
    path = Path(path)
    return (path / "latest_checkpointed_iteration.txt").is_file() or (path / "run_config.yaml").is_file()


def keep_hf_source(root: Path, files: Iterable[Path], dtypes: dict[str, str], form: str | None = None) -> Path:
    """Copy Hugging Face files beside a Megatron checkpoint, so that exporting needs nothing else.

    Args:
        root: the Megatron checkpoint's directory.
        files: config.json, tokenizer and so on.
        dtypes: safetensors dtype of each tensor of the source, restored by an export.
        form: of a BitNet source's weights (`models.falcon_edge.weights.Form`), likewise; None for any other source.
    """
    with atomic_directory(root / HF_SOURCE_NAME) as directory:
        for file in files:
            shutil.copyfile(file, directory / file.name)
        (directory / _DTYPES_NAME).write_text(json.dumps(dtypes, indent=1) + "\n")
        if form is not None:
            (directory / _FORM_NAME).write_text(json.dumps({"form": form}) + "\n")
    return root / HF_SOURCE_NAME


def copy_hf_source(source: Path, root: Path) -> None:
    """Hand the Hugging Face files of one Megatron checkpoint directory on to another, unless it has them already."""
    target = root / HF_SOURCE_NAME
    if source.is_dir() and not target.exists():
        with atomic_directory(target) as directory:
            shutil.copytree(source, directory, dirs_exist_ok=True)


def source_dtypes(hf_source: Path | None) -> dict[str, str]:
    """The safetensors dtypes that `keep_hf_source` recorded; empty where there are none."""
    path = hf_source / _DTYPES_NAME if hf_source else None
    return json.loads(path.read_text()) if path and path.is_file() else {}


def source_form(hf_source: Path | None) -> str | None:
    """The form of a BitNet source's weights that `keep_hf_source` recorded; packed, where the dtypes show it."""
    path = hf_source / _FORM_NAME if hf_source else None
    if path and path.is_file():
        return json.loads(path.read_text())["form"]
    return "bitnet" if has_packed_weights(source_dtypes(hf_source)) else None


def source_files(hf_source: Path) -> list[Path]:
    """The Hugging Face files that an export restores."""
    return sorted(path for path in hf_source.iterdir() if path.name not in (_DTYPES_NAME, _FORM_NAME))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _latest(path: Path) -> int:
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        hint = " (it is a Hugging Face checkpoint: use `convert import`)" if (path / "config.json").is_file() else ""
        raise UserError(f"{path} is not a Megatron checkpoint: it has no latest_checkpointed_iteration.txt{hint}")
    text = tracker.read_text(errors="replace").strip()[:40]
    if not _is_number(text):
        raise UserError(f"{tracker} holds {text!r} instead of an iteration number: the checkpoint is damaged")
    return int(text)
