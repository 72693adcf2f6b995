"""A small Falcon-H1 with random weights, as a Hugging Face checkpoint of transformers' own class."""

from pathlib import Path


def write_initial_checkpoint(directory: Path, tokenizer, seed: int, max_length: int) -> int:
    """Write a FalconH1ForCausalLM, freshly initialised by transformers, in the shape of the tiny CPU recipe.

    Args:
        directory: where; the tokenizer may be there already.
        tokenizer: its special tokens go into the config.
        seed: of the weights.
        max_length: the model's context in tokens.

    Returns:
        The number of parameters.
    """
    import torch
    from transformers import FalconH1Config, FalconH1ForCausalLM

    from falcon_bridge.models.falcon_h1.bridge import FalconH1Bridge
    from falcon_bridge.recipes import falcon_h1_tiny_cpu_pretrain_config

    provider = falcon_h1_tiny_cpu_pretrain_config().model
    provider.vocab_size = len(tokenizer)
    provider.max_position_embeddings = max_length
    provider.bos_token_id, provider.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    provider.pad_token_id = tokenizer.pad_token_id
    config = FalconH1Config(**FalconH1Bridge.megatron_to_hf_config(provider))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FalconH1ForCausalLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())
