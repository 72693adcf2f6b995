"""What a Falcon-Edge model cannot be or do, said in one line before anything is built."""

from megatron.core.tensor_parallel.random import HAVE_TE

from falcon_bridge.bitnet.validation import check_bitnet
from falcon_bridge.models.build import (
    check_architecture,
    check_cuda_graph,
    check_expressible,
    check_pipeline,
    recomputed_modules,
    refuse,
)


def check_supported(config) -> None:
    """Refuse configurations that would fail later or be ignored.

    Args:
        config: A `FalconEdgeModelProvider`, not necessarily finalized.

    Raises:
        ValueError: With one line that names the field and says what to change.
    """
    check_bitnet(config)
    _check_heads(config)
    _check_parallel_layout(config)
    check_architecture(config, "Falcon-Edge")
    refuse(
        {
            "use_mup": (config.use_mup, "Falcon-Edge has no multipliers: unset it"),
            "attention_output_gate": (config.attention_output_gate, "Falcon-Edge's attention has no gate: unset it"),
            "fp16": (config.fp16, "use bf16"),
            "cpu_offloading": (
                config.cpu_offloading,
                "offloading has not been shown to be right for Falcon-Edge: use recompute_granularity",
            ),
        }
    )
    check_expressible(config, "Falcon-Edge")
    check_cuda_graph(config)
    if config.softmax_scale is not None:
        raise ValueError(f"softmax_scale={config.softmax_scale!r} is not supported by Falcon-Edge; use None")
    if "layernorm" in recomputed_modules(config) and not HAVE_TE:
        raise ValueError(
            "recompute_modules has 'layernorm', which Megatron recomputes with Transformer Engine only: leave it out, "
            "or install falcon-bridge[gpu]"
        )


def tensor_parallel_sizes(config) -> list[int]:
    """The tensor-parallel sizes that the shapes of a `FalconEdgeModelProvider` allow, in order."""
    heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
    return [
        tp
        for tp in range(1, heads + 1)
        if heads % tp == 0 and config.ffn_hidden_size % tp == 0 and (groups % tp == 0 or tp % groups == 0)
    ]


def _check_heads(config) -> None:
    heads, groups = config.num_attention_heads, config.num_query_groups
    if heads < 1:
        raise ValueError(f"num_attention_heads={heads} must be positive")
    if groups and heads % groups:
        raise ValueError(f"num_attention_heads={heads} must be a multiple of num_query_groups={groups}")


def _check_parallel_layout(config) -> None:
    tp, sizes = config.tensor_model_parallel_size, tensor_parallel_sizes(config)
    if tp not in sizes:
        raise ValueError(
            f"tensor_model_parallel_size={tp} does not fit num_attention_heads={config.num_attention_heads}, "
            f"num_query_groups={config.num_query_groups} and ffn_hidden_size={config.ffn_hidden_size}: use one of "
            f"{sizes}"
        )
    check_pipeline(config)
