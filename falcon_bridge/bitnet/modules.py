"""Which modules are ternary: the one table that code, tests and documentation share."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TernaryModule:
    """A linear layer that `use_bitnet` makes a BitNet one.

    Attributes:
        branch: Part of a layer that it belongs to.
        megatron: Last component of its name in Megatron.
        hugging_face: Last components of the Hugging Face matrices it holds, each of which has a scale of its own.
        parallelism: How tensor parallelism splits it.
        matrices: `BitNetColumnParallelLinear`'s argument of that name.
    """

    branch: Literal["attention", "SSM", "MLP"]
    megatron: str
    hugging_face: tuple[str, ...]
    parallelism: Literal["column", "row"]
    matrices: Literal["qkv", "gate_up"] | None = None


TERNARY_MODULES = (
    TernaryModule("attention", "linear_qkv", ("q_proj", "k_proj", "v_proj"), "column", "qkv"),
    TernaryModule("attention", "linear_proj", ("o_proj",), "row"),
    TernaryModule("SSM", "in_proj", ("in_proj",), "column"),
    TernaryModule("SSM", "out_proj", ("out_proj",), "row"),
    TernaryModule("MLP", "linear_fc1", ("gate_proj", "up_proj"), "column", "gate_up"),
    TernaryModule("MLP", "linear_fc2", ("down_proj",), "row"),
)
"""All of them; a family without an SSM branch has the others. Everything else stays as it is: embeddings, the output
layer, norms, the SSM's convolution, A_log, D and dt_bias."""
