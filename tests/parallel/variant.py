"""A layout together with provider fields that differ from those of the Hugging Face checkpoint."""

from dataclasses import dataclass, field
from typing import Any

from falcon_bridge.verification.layout import ParallelLayout


@dataclass(frozen=True)
class Variant(ParallelLayout):
    """`fields` may say what no Hugging Face config can, such as a layer pattern, which leaves out some tensors."""

    fields: dict[str, Any] = field(default_factory=dict)

    def provider_fields(self) -> dict[str, Any]:
        return {**super().provider_fields(), **self.fields}


def identify(layout: ParallelLayout) -> str:
    parts = [str(layout), layout.distributed_optimizer and "distributed-optimizer", layout.pipeline_layout]
    counts = [f"{name}{n}" for name in ("first", "last") if (n := getattr(layout, f"{name}_stage_layers"))]
    return "-".join(part for part in [*parts, *counts] if part)
