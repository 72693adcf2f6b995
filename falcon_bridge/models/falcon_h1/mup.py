"""µP forward multipliers of Falcon-H1 and the law by which TII sets them from the width.

Source: Falcon-H1 report (arXiv 2507.22448, section on µP with tunable multipliers) and the released configs; the law
below reproduces the multipliers of the 0.5B, 1.5B-Deep, 7B and 34B checkpoints to the last bits of a float. The base
shape is 1.5B-Deep. Falcon-H1-Tiny does not follow it: its multipliers were folded into its weights.
"""

from dataclasses import dataclass, fields
from math import sqrt


@dataclass(frozen=True)
class FalconH1Multipliers:
    """The non-learnable multipliers of a Falcon-H1 forward pass, named as in the Hugging Face config.

    Attributes:
        embedding_multiplier: Scales the token embeddings.
        lm_head_multiplier: Scales the logits.
        key_multiplier: Scales the keys, before RoPE.
        attention_in_multiplier: Scales the input of the attention branch.
        attention_out_multiplier: Scales the output of the attention branch.
        ssm_in_multiplier: Scales the input of the SSM branch.
        ssm_out_multiplier: Scales the output of the SSM branch.
        mlp_multipliers: Scales of the gate (inside the SiLU) and of the output of the MLP.
        ssm_multipliers: Scales of z, x, B, C and dt as they leave `in_proj`.
    """

    embedding_multiplier: float = 1.0
    lm_head_multiplier: float = 1.0
    key_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    mlp_multipliers: tuple[float, float] = (1.0, 1.0)
    ssm_multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    def as_dict(self) -> dict[str, float | tuple[float, ...]]:
        """Return the multipliers as keyword arguments of a provider or of `FalconH1Config`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def falcon_h1_multipliers(
    *,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    head_dim: int,
    d_ssm: int,
    d_state: int,
) -> FalconH1Multipliers:
    """Multipliers of any width by TII's law, so that learning rate, weight decay and init std do not depend on it.

    There is no depth term. With no heads on one side, the multiplier of that branch's output has no meaning and is 1.

    Args:
        hidden_size: Width d of the residual stream.
        ffn_hidden_size: Width of the MLP.
        num_attention_heads: Query heads; may be 0.
        head_dim: Channels a query head.
        d_ssm: Inner width of the SSM (heads times head size); may be 0.
        d_state: SSM state size a head channel.

    Returns:
        The multipliers.

    Raises:
        ValueError: If a width is not positive.
    """
    positive = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "head_dim": head_dim,
        "d_state": d_state,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if num_attention_heads < 0 or d_ssm < 0:
        raise ValueError(f"num_attention_heads and d_ssm must not be negative, got {num_attention_heads} and {d_ssm}")
    attention_width = num_attention_heads * head_dim
    return FalconH1Multipliers(
        embedding_multiplier=sqrt(32),
        lm_head_multiplier=40 / hidden_size,
        key_multiplier=2**-2.5 * (1280 / hidden_size) ** 2 * sqrt(128 / head_dim),
        attention_in_multiplier=1.0,
        attention_out_multiplier=491520 / (hidden_size * attention_width) if attention_width else 1.0,
        ssm_in_multiplier=1280 / hidden_size,
        ssm_out_multiplier=1536 / d_ssm / sqrt(18) if d_ssm else 1.0,
        mlp_multipliers=(2**-0.5 * 1280 / hidden_size, 1228800 / (hidden_size * ffn_hidden_size)),
        ssm_multipliers=(2**-1.5, 0.25, 2**-2.5 * 256 / d_state, 0.5, 2**-1.5),
    )
