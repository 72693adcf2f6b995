"""How large the main job is, and what came out of it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DemoSettings:
    """How large the main job is.

    Attributes:
        out: directory for everything; it must exist.
        seed: of weights, data order and sample.
        steps: of the first training run.
        resume_steps: of the second one, from the first one's checkpoint.
        vocab_size: of the tokenizer; odd on purpose, as Falcon-H1's are.
        held_out_rows: rows of held-out text for the checks.
        held_out_length: tokens of each.
        sample_tokens: to generate.
        loss_drop: nats that the training loss must fall by.
    """

    out: Path
    seed: int = 1234
    steps: int = 200
    resume_steps: int = 30
    vocab_size: int = 1021
    held_out_rows: int = 24
    held_out_length: int = 256
    sample_tokens: int = 60
    loss_drop: float = 2.0


@dataclass(frozen=True)
class Check:
    """One thing that the main job proves: what, whether, and the figures."""

    name: str
    ok: bool
    detail: str


@dataclass
class DemoResult:
    """What the main job did.

    Attributes:
        figures: numbers and paths by name.
        checks: what was proved.
        steps: the training steps of both runs.
        sample: generated text.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    steps: list = field(default_factory=list)
    sample: str = ""

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """For ``--json`` and summary.json."""
        return {
            "ok": self.ok,
            **self.figures,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "losses": [step.loss for step in self.steps],
            "sample": self.sample,
        }
