"""A BitNet Llama in plain PyTorch: what the Megatron model, under any layout, must compute.

Rows are computed one by one and matrices are whole: nothing is fused, sharded, cached or batched. In fp64 only
`bitlinear`'s own arithmetic is coarser, and that is exact in its integer part: two implementations that agree to 1e-12
before it then choose the same codes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig

from falcon_bridge.bitnet.reference import bitlinear, quantize_activation


@dataclass
class BitNetLlama:
    """A `prequantized` checkpoint.

    Attributes:
        config: Its config.
        weights: Latent weights by Hugging Face name, leaves that receive gradients.
        margin: How near any activation so far came to the middle between two int8 codes, in steps of a code. Where
            this is well above fp32's rounding, 127·1e-6, every correct implementation chooses the same codes.
    """

    config: LlamaConfig
    weights: dict[str, torch.Tensor] = field(repr=False)
    margin: float = 0.5

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> "BitNetLlama":
        weights = load_file(path / "model.safetensors")
        return cls(
            LlamaConfig.from_pretrained(path),
            {name: tensor.to(dtype).requires_grad_() for name, tensor in weights.items()},
        )

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[b, s, vocab]` for tokens `[b, s]`."""
        return torch.stack([self._row(row) for row in tokens])

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over the tokens that have a successor."""
        return F.cross_entropy(self.logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def _row(self, tokens: torch.Tensor) -> torch.Tensor:
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[tokens]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            x = x + self._attention(f"{prefix}.self_attn", self._norm(f"{prefix}.input_layernorm", x))
            x = x + self._mlp(f"{prefix}.mlp", self._norm(f"{prefix}.post_attention_layernorm", x))
        head = embedding if self.config.tie_word_embeddings else self.weights["lm_head.weight"]
        return self._norm("model.norm", x) @ head.T

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scaled = x.detach().float() * quantize_activation(x)[1]
        self.margin = min(self.margin, (scaled - scaled.floor() - 0.5).abs().min().item())
        return bitlinear(x, self.weights[f"{name}.weight"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.config.rms_norm_eps) * self.weights[f"{name}.weight"]

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._linear(f"{name}.gate_proj", x), self._linear(f"{name}.up_proj", x)
        return self._linear(f"{name}.down_proj", F.silu(gate) * up)

    def _attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = (self._linear(f"{name}.{part}_proj", x).unflatten(-1, (-1, self.config.head_dim)) for part in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        scores = torch.einsum("snd,tnd->nst", q, k) / self.config.head_dim**0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        probabilities = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self._linear(f"{name}.o_proj", torch.einsum("nst,tnd->snd", probabilities, v).flatten(1))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE of `[s, heads, head_dim]`, on halves; angles in fp32, as in Megatron and transformers."""
        half = self.config.head_dim // 2
        theta = self.config.rope_parameters["rope_theta"]
        frequencies = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(len(x), dtype=torch.float32), frequencies)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def tokens_off_ties(path: Path, rows: int, length: int, margin: float = 2e-4) -> torch.Tensor:
    """Tokens `[rows, length]` on which no activation comes within `margin` of the middle between two codes."""
    for seed in range(500):
        oracle = BitNetLlama.load(path, torch.float64)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, oracle.config.vocab_size, (rows, length), generator=generator)
        with torch.no_grad():
            oracle.logits(tokens)
        if oracle.margin > margin:
            return tokens
    raise AssertionError("no such tokens: take fewer")
