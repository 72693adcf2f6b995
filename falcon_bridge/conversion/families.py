"""The model families that can be converted, by the provider of a Megatron checkpoint. Imports Megatron."""

from dataclasses import dataclass
from typing import Any

from transformers import FalconH1Config, LlamaConfig

from falcon_bridge.conversion.hf_config import FALCON_H1, LLAMA
from falcon_bridge.models.falcon_edge.bridge import FalconEdgeBridge
from falcon_bridge.models.falcon_edge.provider import FalconEdgeModelProvider
from falcon_bridge.models.falcon_h1.bridge import FalconH1Bridge
from falcon_bridge.models.falcon_h1.provider import FalconH1ModelProvider


@dataclass(frozen=True)
class Family:
    """What converts one family.

    Attributes:
        architecture: In config.json.
        provider: Of Megatron models; its subclasses too.
        bridge: Of weights and config.
        hf_config: Of transformers.
    """

    architecture: str
    provider: type
    bridge: type
    hf_config: type


FAMILIES = (
    Family(FALCON_H1, FalconH1ModelProvider, FalconH1Bridge, FalconH1Config),
    Family(LLAMA, FalconEdgeModelProvider, FalconEdgeBridge, LlamaConfig),
)


def family_of(provider: Any) -> Family | None:
    """The family of a provider, or None for one that is not ours."""
    return next((family for family in FAMILIES if isinstance(provider, family.provider)), None)
