"""Long-context stages of a pretraining, where the released model has that context, for 80 GB GPUs."""

from megatron.bridge.training.config import ConfigContainer

from falcon_bridge.models.falcon_h1 import sizes
from falcon_bridge.recipes._falcon_h1 import falcon_h1_long_context


def falcon_h1_90m_128k_pretrain_config() -> ConfigContainer:
    """Falcon-H1-Tiny-90M on rows of 128k tokens: eight GPUs and up, CP 4."""
    model = sizes.FalconH1ModelProvider90M()
    return falcon_h1_long_context("falcon_h1_90m_128k", model, seq_length=131072, cp=4)


def falcon_h1_90m_256k_pretrain_config() -> ConfigContainer:
    """Falcon-H1-Tiny-90M on rows of 256k tokens: eight GPUs and up, CP 8."""
    model = sizes.FalconH1ModelProvider90M()
    return falcon_h1_long_context("falcon_h1_90m_256k", model, seq_length=262144, cp=8)


def falcon_h1_1p5b_128k_pretrain_config() -> ConfigContainer:
    """Falcon-H1-1.5B on rows of 128k tokens: eight GPUs and up, CP 8."""
    model = sizes.FalconH1ModelProvider1P5B()
    return falcon_h1_long_context("falcon_h1_1p5b_128k", model, seq_length=131072, cp=8)


def falcon_h1_1p5b_deep_128k_pretrain_config() -> ConfigContainer:
    """Falcon-H1-1.5B-Deep on rows of 128k tokens: eight GPUs and up, CP 8."""
    model = sizes.FalconH1ModelProvider1P5BDeep()
    return falcon_h1_long_context("falcon_h1_1p5b_deep_128k", model, seq_length=131072, cp=8)


def falcon_h1_3b_128k_pretrain_config() -> ConfigContainer:
    """Falcon-H1-3B on rows of 128k tokens: eight GPUs and up, CP 8."""
    model = sizes.FalconH1ModelProvider3B()
    return falcon_h1_long_context("falcon_h1_3b_128k", model, seq_length=131072, cp=8)


def falcon_h1_7b_128k_pretrain_config() -> ConfigContainer:
    """Falcon-H1-7B on rows of 128k tokens: 16 GPUs and up, TP 2 and CP 4."""
    model = sizes.FalconH1ModelProvider7B()
    return falcon_h1_long_context("falcon_h1_7b_128k", model, seq_length=131072, tp=2, cp=4)


def falcon_h1_7b_256k_pretrain_config() -> ConfigContainer:
    """Falcon-H1-7B on rows of 256k tokens: 32 GPUs and up, TP 4 and CP 2."""
    model = sizes.FalconH1ModelProvider7B()
    return falcon_h1_long_context("falcon_h1_7b_256k", model, seq_length=262144, tp=4, cp=2, recompute="full")


def falcon_h1_34b_128k_pretrain_config() -> ConfigContainer:
    """Falcon-H1-34B on rows of 128k tokens: 64 GPUs and up, TP 4, PP 2 and CP 8."""
    model = sizes.FalconH1ModelProvider34B()
    return falcon_h1_long_context("falcon_h1_34b_128k", model, seq_length=131072, tp=4, pp=2, cp=8)


def falcon_h1_34b_256k_pretrain_config() -> ConfigContainer:
    """Falcon-H1-34B on rows of 256k tokens: 128 GPUs and up, TP 4, PP 4 and CP 8."""
    model = sizes.FalconH1ModelProvider34B()
    return falcon_h1_long_context("falcon_h1_34b_256k", model, seq_length=262144, tp=4, pp=4, cp=8)
