"""A parallel layout, and the clear refusal of what it cannot do."""

from dataclasses import asdict, dataclass
from typing import Any

from falcon_bridge.errors import UserError


@dataclass(frozen=True)
class ParallelLayout:
    """How a model is spread over ranks, in Megatron's terms.

    Attributes:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        vp: virtual pipeline stages (model chunks) a pipeline rank.
        cp: context-parallel size.
        dp: data-parallel size.
        sequence_parallel: Megatron's sequence parallelism, inside tensor parallelism.
        distributed_optimizer: shard gradients and optimizer state over the data-parallel ranks.
        first_stage_layers: layers of the first pipeline stage, where the split is uneven.
        last_stage_layers: layers of the last one.
        pipeline_layout: explicit stages in mcore's notation, such as ``"Et|ttL"``.
    """

    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    pipeline_layout: str | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    def describe(self) -> dict[str, Any]:
        """The layout as JSON: the five sizes and sequence_parallel, and what else is set."""
        optional = ("distributed_optimizer", "first_stage_layers", "last_stage_layers", "pipeline_layout")
        return {k: v for k, v in asdict(self).items() if k not in optional or v}

    def __str__(self) -> str:
        sizes = [f"{name.upper()}{getattr(self, name)}" for name in ("tp", "pp", "vp", "cp", "dp")]
        sizes = [size for size in sizes if not size.endswith("P1")] + ["SP"] * self.sequence_parallel
        return "×".join(sizes) or "one process"

    def provider_fields(self) -> dict[str, Any]:
        """The same as fields of a Megatron Bridge model provider."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vp if self.vp > 1 else None,
            "context_parallel_size": self.cp,
            "sequence_parallel": self.sequence_parallel,
            "num_layers_in_first_pipeline_stage": self.first_stage_layers,
            "num_layers_in_last_pipeline_stage": self.last_stage_layers,
            "pipeline_model_parallel_layout": self.pipeline_layout,
        }

    def check(self, config: Any, *, seq_length: int, batch_size: int, device: str) -> None:
        """Refuse what this layout cannot do for a model and a batch.

        Args:
            config: the transformers config (``FalconH1Config`` or ``LlamaConfig``).
            seq_length: tokens a row.
            batch_size: rows of the global batch.
            device: ``"cpu"`` or ``"cuda"``.

        Raises:
            UserError: with what to change.
        """
        for name in ("tp", "pp", "vp", "cp", "dp"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        self._check_tensor_parallel(config, seq_length)
        self._check_pipeline(config)
        if self.cp > 1 and device == "cpu":
            raise UserError(
                "--cp above 1 needs GPUs, for only Transformer Engine's attention has context parallelism: use --cp 1"
            )
        if seq_length % (2 * self.cp) and self.cp > 1:
            raise UserError(f"--seq-length {seq_length} must be a multiple of 2·cp = {2 * self.cp}")
        rows = self.dp * (self.pp if self.pp > 1 else 1)
        if batch_size % rows:
            raise UserError(f"--batch-size {batch_size} must be a multiple of dp·pp = {rows} (a micro-batch for each)")

    def _check_tensor_parallel(self, config: Any, seq_length: int) -> None:
        if self.sequence_parallel and self.tp == 1:
            raise UserError("--sequence-parallel works inside tensor parallelism: give --tp 2 or more")
        if self.sequence_parallel and seq_length % (self.tp * self.cp):
            raise UserError(
                f"--sequence-parallel needs a --seq-length that is a multiple of tp = {self.tp}, not {seq_length}"
            )
        widths = {
            "attention heads": config.num_attention_heads,
            "SSM heads": getattr(config, "mamba_n_heads", None),  # a Llama has none
            "MLP channels": config.intermediate_size,
        }
        widths = {what: number for what, number in widths.items() if number is not None}
        for what, number in widths.items():
            if number % self.tp:
                raise UserError(f"--tp {self.tp} does not divide the model's {number} {what}: {_allowed(widths)}")
        kv_heads = config.num_key_value_heads
        if kv_heads % self.tp and self.tp % kv_heads:
            raise UserError(
                f"--tp {self.tp} must divide the model's {kv_heads} key-value heads or be a multiple of them"
            )

    def _check_pipeline(self, config: Any) -> None:
        if self.vp > 1 and self.pp == 1:
            raise UserError("--vp needs pipeline parallelism: give --pp 2 or more")
        uneven = self.first_stage_layers or self.last_stage_layers or self.pipeline_layout
        layers, stages = config.num_hidden_layers, self.pp * self.vp
        if not uneven and layers % stages:
            raise UserError(
                f"{layers} layers do not split evenly over pp·vp = {stages} stages: choose a divisor of {layers}, "
                "or give --first-stage-layers and --last-stage-layers, or --pipeline-layout"
            )


def _allowed(widths: dict[str, int]) -> str:
    smallest = min(widths.values())
    sizes = [tp for tp in range(1, smallest + 1) if not any(width % tp for width in widths.values())]
    return "it can be " + ", ".join(map(str, sizes))
