"""Pretraining recipes of the released Falcon-H1 sizes, for 80 GB GPUs."""

from megatron.bridge.training.config import ConfigContainer

from falcon_bridge.models.falcon_h1 import sizes
from falcon_bridge.recipes._falcon_h1 import falcon_h1_pretrain


def falcon_h1_90m_pretrain_config() -> ConfigContainer:
    """Falcon-H1-Tiny-90M from scratch: one GPU and up."""
    return falcon_h1_pretrain("falcon_h1_90m", sizes.FalconH1ModelProvider90M(), micro_batch_size=8)


def falcon_h1_500m_pretrain_config() -> ConfigContainer:
    """Falcon-H1-0.5B from scratch: one GPU and up."""
    return falcon_h1_pretrain("falcon_h1_500m", sizes.FalconH1ModelProvider500M(), micro_batch_size=4)


def falcon_h1_500m_bitnet_pretrain_config() -> ConfigContainer:
    """Falcon-H1-0.5B with BitNet b1.58 linear layers, from scratch: one GPU and up."""
    model = sizes.FalconH1ModelProvider500M(use_bitnet=True)
    return falcon_h1_pretrain("falcon_h1_500m_bitnet", model, micro_batch_size=4)


def falcon_h1_1p5b_pretrain_config() -> ConfigContainer:
    """Falcon-H1-1.5B from scratch: one GPU and up."""
    return falcon_h1_pretrain("falcon_h1_1p5b", sizes.FalconH1ModelProvider1P5B(), micro_batch_size=2)


def falcon_h1_1p5b_deep_pretrain_config() -> ConfigContainer:
    """Falcon-H1-1.5B-Deep from scratch: one GPU and up."""
    return falcon_h1_pretrain("falcon_h1_1p5b_deep", sizes.FalconH1ModelProvider1P5BDeep())


def falcon_h1_3b_pretrain_config() -> ConfigContainer:
    """Falcon-H1-3B from scratch: eight GPUs and up, data parallel."""
    return falcon_h1_pretrain("falcon_h1_3b", sizes.FalconH1ModelProvider3B())


def falcon_h1_7b_pretrain_config() -> ConfigContainer:
    """Falcon-H1-7B from scratch: eight GPUs and up, TP 2."""
    return falcon_h1_pretrain("falcon_h1_7b", sizes.FalconH1ModelProvider7B(), tp=2)


def falcon_h1_34b_pretrain_config() -> ConfigContainer:
    """Falcon-H1-34B from scratch: 32 GPUs and up, TP 4 and PP 4."""
    return falcon_h1_pretrain("falcon_h1_34b", sizes.FalconH1ModelProvider34B(), tp=4, pp=4)
