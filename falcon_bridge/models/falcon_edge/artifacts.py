"""Keeping BitNet's `quantization_config` in what Bridge saves beside the weights."""

import functools

from megatron.bridge.models.hf_pretrained.base import PreTrainedBase

from falcon_bridge.conversion.bitnet_config import is_bitnet, quantization_entry


def keep_quantization_config() -> None:
    """Have `PreTrainedBase.save_artifacts` keep the `quantization_config` of BitNet checkpoints; idempotent.

    Bridge deletes the entry from the config that it writes, and from the one in memory, on rank 0 alone: without it
    the saved weights cannot be told from dense ones, and rank 0 would go on with another bridge than the others.
    """
    original = PreTrainedBase.save_artifacts
    if getattr(original, "keeps_quantization_config", False):
        return

    @functools.wraps(original)
    def save_artifacts(self, save_directory, *args, **kwargs):
        config = self.config
        entry = quantization_entry(config) if is_bitnet(config) else None
        if entry is None:
            original(self, save_directory, *args, **kwargs)
            return
        try:
            original(self, save_directory, *args, **kwargs)
        finally:
            config.quantization_config = entry
        config.save_pretrained(save_directory)

    save_artifacts.keeps_quantization_config = True
    PreTrainedBase.save_artifacts = save_artifacts
