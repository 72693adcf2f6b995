"""Hugging Face → Megatron → Hugging Face through files, compared bit by bit."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from falcon_bridge.conversion.compare import Comparison, compare_checkpoints
from falcon_bridge.conversion.exporter import export_checkpoint
from falcon_bridge.conversion.importer import Progress, import_checkpoint
from falcon_bridge.errors import UserError


if TYPE_CHECKING:
    from falcon_bridge.verification.layout import ParallelLayout


def round_trip(
    hf: str | Path,
    layout: "ParallelLayout",
    *,
    work_dir: Path | None = None,
    allow_nonfinite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Comparison, float]:
    """Import and export a checkpoint and compare the result with it.

    Args:
        hf: directory or hub id.
        layout: ranks to convert on, both ways.
        work_dir: where the two copies are made, and removed; the system's temporary place where None.
        allow_nonfinite: accept NaN, infinite and absurdly large weights.
        progress: called with a stage's name, steps done and steps in all.

    Returns:
        What differs, and the seconds it took.

    Raises:
        UserError: the source, `work_dir` or the layout cannot be used.
        JobError: a conversion failed.
    """
    started = time.monotonic()
    if work_dir is not None and not work_dir.is_dir():
        raise UserError(f"--work-dir {work_dir} is no directory: make it first")
    with tempfile.TemporaryDirectory(prefix="falcon_bridge_roundtrip_", dir=work_dir) as directory:
        megatron, back = Path(directory) / "megatron", Path(directory) / "hf"
        source = import_checkpoint(hf, megatron, layout, allow_nonfinite=allow_nonfinite, progress=progress)
        export_checkpoint(megatron, back, layout, allow_nonfinite=allow_nonfinite, progress=progress)
        return compare_checkpoints(source.path, back), time.monotonic() - started
