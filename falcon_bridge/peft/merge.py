"""Adapters into the weights that they adapt."""

from collections.abc import Iterable

import torch
from torch import nn

from falcon_bridge.peft.lora import LoRALinear


@torch.no_grad()
def merge_adapters(model: nn.Module | Iterable[nn.Module]) -> None:
    """Make the adapted linear layers plain ones that do the same.

    The sum is made in fp32 and rounded once, to the layer's dtype.

    Args:
        model: the model or its chunks, on every rank; changed in place.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    for chunk in chunks:
        for parent in list(chunk.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, LoRALinear):
                    child.weight.copy_(child.merged_weight())
                    setattr(parent, name, child.to_wrap)
