"""LoRA: a trained low-rank product beside each frozen linear layer (arXiv 2106.09685)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.bridge.peft.base import PEFT
from megatron.bridge.peft.module_matcher import ModuleMatcher
from megatron.bridge.peft.utils import wildcard_match
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from falcon_bridge.models.build import recomputed_modules
from falcon_bridge.peft.adapter import COLUMN_PARALLEL, ROW_PARALLEL, Adapter


TARGETS = COLUMN_PARALLEL + ROW_PARALLEL
"""The linear layers of a Falcon-H1 block: attention, SSM, MLP."""


class LoRALinear(AdapterWrapper):
    """A frozen linear layer with an adapter: `W·x + B·A·x·alpha/dim`.

    Whatever multiplies the layer's output (µP) multiplies the adapter's with it.
    """

    adapter: Adapter

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weight of the wrapped layer."""
        return self.to_wrap.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The wrapped layer's output with the adapter's added, and its bias."""
        output, bias, adapter_input = self.base_linear_forward(x, *args, **kwargs)
        if self._adapter_enabled:
            output = output + self.adapter(adapter_input.contiguous()).reshape(output.shape)
        return output, bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """This rank's part of the weight of one linear layer that does the same, fp32 `[out/tp, in]`."""
        return self.weight.float() + self.adapter.product(torch.float32)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The wrapped layer's under its own names, and the adapter's."""
        state = self.to_wrap.sharded_state_dict(prefix, sharded_offsets, metadata)
        return {**state, **self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)}


@dataclass
class LoRA(PEFT, ModuleMatcher):
    """LoRA for Falcon-H1, in the place of Megatron Bridge's.

    Attributes:
        target_modules: names of the layers to adapt, out of `TARGETS`, or wildcards that end with one
            ("*.layers.0.*.in_proj").
        dim: rank.
        alpha: scale of the adapter, times dim.
        dropout: of the adapter's input.
        lora_A_init_method: "xavier", "normal" or "kaiming".
    """

    target_modules: list[str] = field(default_factory=lambda: [*TARGETS])
    dim: int = 32
    alpha: float = 32
    dropout: float = 0.0
    lora_A_init_method: str = "xavier"

    def __call__(self, model: Any, training: bool = True) -> Any:
        """Freeze `model` and wrap its target layers.

        Args:
            model: the model or its chunks, before they are wrapped for data parallelism.
            training: whether the adapters will be trained.

        Returns:
            `model`.

        Raises:
            ValueError: it is not a model that can have these adapters.
        """
        chunks = unwrap_model(model if isinstance(model, list) else [model])
        self.check(chunks[0].config)
        adapted = super().__call__(model, training=training)
        for chunk in chunks:
            # for the FLOP count, which Megatron asks of the model's config alone
            chunk.config.trained_adapters = self
        return adapted

    def check(self, config: Any) -> None:
        """Refuse adapters that would not be trained, or would be wrong.

        Args:
            config: a `FalconH1ModelProvider`.

        Raises:
            ValueError: with one line that says what to change.
        """
        if getattr(config, "use_bitnet", False):
            raise ValueError(
                "adapters on a BitNet model are not supported: ternary weights and an adapter do not add up to "
                "ternary weights. Fine-tune all weights (an sft recipe), or set model.use_bitnet=False"
            )
        if "layernorm" in recomputed_modules(config):
            raise ValueError(
                "model.recompute_modules has 'layernorm': below the first adapter of a frozen model no gradient comes "
                "by to start that recomputation; leave it out"
            )
        if self.dim < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"peft.dim={self.dim} must be positive, and peft.dropout={self.dropout} in [0, 1)")
        tp = config.tensor_model_parallel_size or 1
        if self.dim % tp:
            raise ValueError(f"peft.dim={self.dim} must be a multiple of model.tensor_model_parallel_size={tp}")
        unknown = [target for target in self.target_modules or [""] if target.rpartition(".")[2] not in TARGETS]
        if unknown or self.exclude_modules:
            raise ValueError(
                f"peft.target_modules must name some of {', '.join(TARGETS)} (conv1d and one-dimensional parameters "
                f"have no adapters), not {unknown or 'all but peft.exclude_modules'}"
            )

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """The layer with an adapter if it is a target; it itself otherwise."""
        if isinstance(module, AdapterWrapper):
            return module
        match = self.match(module, name, prefix)
        return module if match is None else self._wrap(module, match[1])

    def adapts(self, full_name: str) -> bool:
        """Whether the linear layer of this path gets an adapter."""
        name = full_name.rpartition(".")[2]
        return any(target == name or wildcard_match(target, full_name) for target in self.target_modules)

    def _wrap(self, linear: nn.Module, full_name: str) -> LoRALinear:
        return LoRALinear(linear, self._adapter(Adapter, linear, full_name))

    def _adapter(self, kind: type[Adapter], linear: nn.Module, full_name: str) -> Adapter:
        return kind(
            linear,
            full_name,
            dim=self.dim,
            alpha=self.alpha,
            dropout=self.dropout,
            init_method=self.lora_A_init_method,
        )
