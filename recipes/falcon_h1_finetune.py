"""Fine-tuning recipes of the released Falcon-H1 sizes, for 80 GB GPUs: all weights (SFT), or adapters (PEFT)."""

from megatron.bridge.training.config import ConfigContainer

from falcon_bridge.models.falcon_h1 import sizes
from falcon_bridge.recipes._falcon_h1 import falcon_h1_peft, falcon_h1_sft


def falcon_h1_90m_sft_config() -> ConfigContainer:
    """Falcon-H1-Tiny-90M fine-tuned on packed chats: one GPU and up."""
    return falcon_h1_sft("falcon_h1_90m_sft", sizes.FalconH1ModelProvider90M())


def falcon_h1_500m_sft_config() -> ConfigContainer:
    """Falcon-H1-0.5B fine-tuned on packed chats: one GPU and up."""
    return falcon_h1_sft("falcon_h1_500m_sft", sizes.FalconH1ModelProvider500M())


def falcon_h1_1p5b_sft_config() -> ConfigContainer:
    """Falcon-H1-1.5B fine-tuned on packed chats: eight GPUs and up."""
    return falcon_h1_sft("falcon_h1_1p5b_sft", sizes.FalconH1ModelProvider1P5B(), recompute="mixer")


def falcon_h1_1p5b_deep_sft_config() -> ConfigContainer:
    """Falcon-H1-1.5B-Deep fine-tuned on packed chats: eight GPUs and up."""
    return falcon_h1_sft("falcon_h1_1p5b_deep_sft", sizes.FalconH1ModelProvider1P5BDeep(), recompute="mixer, mlp")


def falcon_h1_3b_sft_config() -> ConfigContainer:
    """Falcon-H1-3B fine-tuned on packed chats: eight GPUs and up."""
    return falcon_h1_sft("falcon_h1_3b_sft", sizes.FalconH1ModelProvider3B(), recompute="mixer, mlp")


def falcon_h1_7b_sft_config() -> ConfigContainer:
    """Falcon-H1-7B fine-tuned on packed chats: eight GPUs and up, TP 2."""
    return falcon_h1_sft("falcon_h1_7b_sft", sizes.FalconH1ModelProvider7B(), tp=2, recompute="mixer, mlp")


def falcon_h1_34b_sft_config() -> ConfigContainer:
    """Falcon-H1-34B fine-tuned on packed chats: 32 GPUs and up, TP 4 and PP 4."""
    return falcon_h1_sft("falcon_h1_34b_sft", sizes.FalconH1ModelProvider34B(), tp=4, pp=4, recompute="mixer, mlp")


def falcon_h1_90m_peft_config(peft_scheme: str = "lora") -> ConfigContainer:
    """Falcon-H1-Tiny-90M with LoRA (or ``peft_scheme="dora"``) on packed chats: one GPU and up."""
    return falcon_h1_peft("falcon_h1_90m_peft", sizes.FalconH1ModelProvider90M(), peft_scheme)


def falcon_h1_500m_peft_config(peft_scheme: str = "lora") -> ConfigContainer:
    """Falcon-H1-0.5B with LoRA (or ``peft_scheme="dora"``) on packed chats: one GPU and up."""
    return falcon_h1_peft("falcon_h1_500m_peft", sizes.FalconH1ModelProvider500M(), peft_scheme)


def falcon_h1_1p5b_peft_config(peft_scheme: str = "lora") -> ConfigContainer:
    """Falcon-H1-1.5B with LoRA (or ``peft_scheme="dora"``) on packed chats: one GPU and up."""
    return falcon_h1_peft("falcon_h1_1p5b_peft", sizes.FalconH1ModelProvider1P5B(), peft_scheme, recompute="mixer")


def falcon_h1_1p5b_deep_peft_config(peft_scheme: str = "lora") -> ConfigContainer:
    """Falcon-H1-1.5B-Deep with LoRA (or ``peft_scheme="dora"``) on packed chats: one GPU and up."""
    return falcon_h1_peft(
        "falcon_h1_1p5b_deep_peft", sizes.FalconH1ModelProvider1P5BDeep(), peft_scheme, recompute="mixer, mlp"
    )


def falcon_h1_3b_peft_config(peft_scheme: str = "lora") -> ConfigContainer:
    """Falcon-H1-3B with LoRA (or ``peft_scheme="dora"``) on packed chats: one GPU and up."""
    return falcon_h1_peft("falcon_h1_3b_peft", sizes.FalconH1ModelProvider3B(), peft_scheme, recompute="mixer, mlp")


def falcon_h1_7b_peft_config(peft_scheme: str = "lora") -> ConfigContainer:
    """Falcon-H1-7B with LoRA (or ``peft_scheme="dora"``) on packed chats: two GPUs and up, TP 2."""
    return falcon_h1_peft(
        "falcon_h1_7b_peft", sizes.FalconH1ModelProvider7B(), peft_scheme, tp=2, recompute="mixer, mlp"
    )


def falcon_h1_34b_peft_config(peft_scheme: str = "lora") -> ConfigContainer:
    """Falcon-H1-34B with LoRA (or ``peft_scheme="dora"``) on packed chats: eight GPUs and up, TP 4 and PP 2."""
    return falcon_h1_peft(
        "falcon_h1_34b_peft", sizes.FalconH1ModelProvider34B(), peft_scheme, tp=4, pp=2, recompute="mixer, mlp"
    )
