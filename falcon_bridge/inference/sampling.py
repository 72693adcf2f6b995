"""Choice of the next token."""

from dataclasses import dataclass

import torch

from falcon_bridge.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, as in transformers' ``GenerationConfig``.

    Attributes:
        temperature: 0 is greedy; above it the logits are divided by it.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the most likely tokens whose probabilities sum to it; 1 for all.
        seed: of the draw.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature must be 0 (greedy) or above, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top-k must be 0 (all tokens) or above, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UserError("--top-k and --top-p need sampling: give --temperature above 0, for instance 0.7")


class TokenSampler:
    """Chooses tokens; the same on every rank that sees the same logits.

    Args:
        sampling: how.
    """

    def __init__(self, sampling: Sampling) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.greedy = sampling.temperature == 0
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.warpers = LogitsProcessorList()
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: `[vocab]` fp32 on CPU.
        """
        if self.greedy:
            return int(logits.argmax())
        probabilities = self.warpers(None, logits[None])[0].softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))
