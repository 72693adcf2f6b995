"""The steps of a run as they are reported, and those that earlier processes of it have left in its directory."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from falcon_bridge.training.callbacks import EvalReport, StepReport


STEPS_NAME = "steps.jsonl"


def run_directory(cfg: Any) -> Path | None:
    """Where a run's report goes: beside its checkpoints, or beside TensorBoard's files; None where it writes neither.

    Args:
        cfg: a ``ConfigContainer``.
    """
    if cfg.checkpoint.save:
        save = Path(cfg.checkpoint.save)
        return save.parent if save.name == "checkpoints" else save
    return Path(cfg.logger.tensorboard_dir).parent if cfg.logger.tensorboard_dir else None


class TrainingRecord:
    """What a run's ranks report, in order and once.

    Attributes:
        steps: of this process, in order.
        evaluations: of this process; a second validation at the same step replaces the first.
        memory: the most bytes that any rank has needed.
    """

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.evaluations: list[EvalReport] = []
        self.memory = 0

    def add(self, event: StepReport | EvalReport) -> bool:
        """Keep an event of any rank; whether it is a step that was not known."""
        if isinstance(event, EvalReport):
            if self.evaluations and self.evaluations[-1].iteration == event.iteration:
                self.evaluations.pop()  # Megatron validates again at the end, on the next batches: that one stands
            self.evaluations.append(event)
            return False
        self.memory = max(self.memory, event.memory)
        new = event.loss is not None and (not self.steps or event.iteration > self.steps[-1].iteration)
        if new:
            self.steps.append(event)
        return new

    def write(self, directory: Path) -> tuple[list[StepReport], list[EvalReport]]:
        """Add this process's steps to those in `directory`, from its first step on replacing them.

        Args:
            directory: of the run; must exist.

        Returns:
            All steps and validations of the run.
        """
        path = directory / STEPS_NAME
        first = self.steps[0].iteration if self.steps else None
        # a validation at step n comes before step n + 1
        steps, evaluations = [], []
        for event in _read(path):
            if first is None or event.iteration < first:
                (steps if isinstance(event, StepReport) else evaluations).append(event)
        steps, evaluations = steps + self.steps, evaluations + self.evaluations
        lines = [json.dumps(dataclasses.asdict(event)) for event in (*steps, *evaluations)]
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())
        return steps, evaluations


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all.

    Args:
        path: of the file; its directory must exist.
        content: of the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> list[StepReport | EvalReport]:
    """The events of `path`; none where it is not there or not ours."""
    events = []
    try:
        for line in path.read_text().splitlines():
            fields = json.loads(line)
            events.append((StepReport if "lr" in fields else EvalReport)(**fields))
    except (OSError, ValueError, TypeError):
        return []
    return events
