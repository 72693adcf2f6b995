"""BitNet linears of one rank or of several, without Megatron's global state."""

import torch
from megatron.core.transformer import TransformerConfig

from falcon_bridge.bitnet.linear import BitNetColumnParallelLinear, BitNetRowParallelLinear


HEADS, GROUPS, HEAD_DIM, FFN = 8, 2, 6, 20
"""Those of `weights.fused`."""


def config(tp=1, **fields):
    return TransformerConfig(
        num_layers=1,
        hidden_size=48,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=tp,
        **fields,
    )


def column(out_features, in_features, group, *, matrices=None, bias=False, fields=None, **kwargs):
    return BitNetColumnParallelLinear(
        in_features,
        out_features,
        config=config(group.size(), **(fields or {})),
        init_method=torch.nn.init.normal_,
        bias=bias,
        matrices=matrices,
        tp_group=group,
        **kwargs,
    )


def row(out_features, in_features, group, *, bias=False, fields=None, **kwargs):
    return BitNetRowParallelLinear(
        in_features,
        out_features,
        config=config(group.size(), **(fields or {})),
        init_method=torch.nn.init.normal_,
        bias=bias,
        tp_group=group,
        **{"input_is_parallel": True, "skip_bias_add": False, **kwargs},
    )


def holding(linear, W, bias=None):
    """`linear` with these weights."""
    linear.load_state_dict({"weight": W} | ({} if bias is None else {"bias": bias}))
    return linear
