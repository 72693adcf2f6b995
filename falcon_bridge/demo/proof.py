"""What transformers and Megatron make of the same weights on the same held-out text."""

from dataclasses import dataclass
from pathlib import Path

import torch

from falcon_bridge.demo.text import tokenized


@dataclass(frozen=True)
class Outcome:
    """A model on held-out text.

    Attributes:
        logits: `[rows, length, vocab]` fp32.
        loss: mean cross entropy a token, in nats.
    """

    logits: torch.Tensor
    loss: float


def held_out_rows(documents: list[str], tokenizer, rows: int, length: int) -> torch.Tensor:
    """The first `rows` stretches of ``length + 1`` tokens of the held-out text, `[rows, length + 1]` int64."""
    stream = [token for tokens in tokenized(documents, tokenizer) for token in tokens]
    return torch.tensor(stream[: rows * (length + 1)]).view(rows, length + 1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cross entropy in nats of `[b, s, vocab]` logits against `[b, s]` labels."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).item()


def transformers_outcome(hf: Path, tokens: torch.Tensor) -> Outcome:
    """Stock transformers on `tokens` (`[rows, length + 1]`), fp32."""
    from transformers import FalconH1ForCausalLM

    model = FalconH1ForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return Outcome(logits, cross_entropy(logits, tokens[:, 1:]))


def megatron_outcome_on_rank(iteration_dir: Path, config_dir: Path, tokens: torch.Tensor) -> Outcome:
    """The Megatron checkpoint on `tokens`, fp32; to be run by `ranks.run_ranks` with one rank.

    The loss is Megatron's own, from its fused output layer and cross entropy.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import build_and_load_model
    from transformers import AutoConfig

    from falcon_bridge.conversion.runtime import conversion_rank, prepare_provider
    from falcon_bridge.verification.layout import ParallelLayout

    with conversion_rank() as device:
        bridge = AutoBridge.from_hf_config(AutoConfig.from_pretrained(config_dir))
        provider = prepare_provider(bridge, ParallelLayout(), torch.float32, load_weights=False)
        (model,) = build_and_load_model(
            str(iteration_dir), provider, use_cpu_init=device.type == "cpu", skip_temp_dist_context=True
        )
        model.eval()
        inputs, labels = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
        positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
        arguments = {"input_ids": inputs, "position_ids": positions, "attention_mask": None}
        logits = model(**arguments)[..., : provider.vocab_size]
        losses = model(**arguments, labels=labels)
    return Outcome(logits.float().cpu(), losses.float().mean().item())


def sample_text(hf: Path, prompt: str, seed: int, max_new_tokens: int) -> str:
    """A continuation of `prompt` by stock transformers, sampled at temperature 0.8."""
    from transformers import AutoTokenizer, FalconH1ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = FalconH1ForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        # without a cache, on which transformers' CPU path for this model is not what is proved here
        output = model.generate(
            **inputs, do_sample=True, temperature=0.8, top_k=40, max_new_tokens=max_new_tokens, use_cache=False
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)
