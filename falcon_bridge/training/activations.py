"""Bytes that a layer keeps for its backward pass on a GPU, tensor by tensor.

Keys are the names of the modules that save the tensors, so that `saved_tensors.SavedTensors` can be held against them.
A tensor that two modules save is counted where it is saved first. The code paths are those of
``transformer_impl="transformer_engine"`` with `ops.ssm_scan` and no dropout.
"""

import math
from typing import Any

from falcon_bridge.models.build import recomputed_modules
from falcon_bridge.ops.linear_cross_entropy import default_chunk_tokens
from falcon_bridge.training.limits import scan_kernels
from falcon_bridge.training.shapes import LayerKind, RankShapes, splits_heads


_MIXER, _MLP = "self_attention", "mlp"


def saved_tensors(shapes: RankShapes, kind: LayerKind, model: Any) -> dict[str, int]:
    """Bytes of a layer's saved tensors by module, without recompute.

    Args:
        shapes: of the rank.
        kind: of the layer.
        model: the provider.
    """
    saved = {}
    norm_input = shapes.sharded_tokens * (shapes.hidden * shapes.residual + 4)  # TE RMSNorm: its input, fp32 rstd
    norm_output = _linear_input(shapes.sharded_tokens, shapes.hidden, shapes, model)  # split under SP
    if kind.attention or kind.mamba:
        saved["input_layernorm"] = norm_input
    if kind.mamba:
        saved |= _mamba(shapes, model)
        saved[f"{_MIXER}.mamba_mixer.in_proj"] = norm_output
    if kind.attention:
        saved |= _attention(shapes, model)
        if not kind.mamba or _ternary(model):  # else one tensor serves both branches
            saved[f"{_attention_module(model)}.linear_qkv"] = norm_output
    if kind.mlp:
        saved["pre_mlp_layernorm"] = norm_input
        saved["mlp.linear_fc1"] = norm_output
        saved["mlp"] = shapes.tokens * 2 * shapes.ffn * shapes.element  # scaled_swiglu: gate and up
        saved["mlp.linear_fc2"] = _linear_input(shapes.tokens, shapes.ffn, shapes, model)
    return saved


def _linear_input(tokens: int, width: int, shapes: RankShapes, model: Any) -> int:
    """TE Linear keeps its input; a BitNet linear int8 codes and an fp32 scale a token."""
    return tokens * (width + 4 if _ternary(model) else width * shapes.element)


def _ternary(model: Any) -> bool:
    return bool(getattr(model, "use_bitnet", False))


def _attention_module(model: Any) -> str:
    return f"{_MIXER}.attention" if hasattr(model, "d_ssm") else _MIXER


def _attention(shapes: RankShapes, model: Any) -> dict[str, int]:
    # TE FusedAttnFunc: q and k behind RoPE, v (made contiguous to match them), its output, and an fp32 log-sum-exp a
    # head; linear_proj's input is that output, unless it comes from other ranks
    elements, module = 2 * shapes.core_query + 2 * shapes.core_key, _attention_module(model)
    core = f"{module}.core_attention" + ".core_attention" * splits_heads(model)
    saved = {core: shapes.tokens * (elements * shapes.element + 4 * shapes.core_heads)}
    if _ternary(model) or splits_heads(model):
        saved[f"{module}.linear_proj"] = _linear_input(shapes.tokens, shapes.query, shapes, model)
    return saved


def _mamba(shapes: RankShapes, model: Any) -> dict[str, int]:
    # ssm_scan: zxbcdt, and the scan's output before the gate; conv output, dt, chunk states and C·B are computed again
    # in its backward
    saved = {
        f"{_MIXER}.mamba_mixer": shapes.ssm_tokens * (shapes.in_proj + shapes.ssm_inner) * shapes.element,
        f"{_MIXER}.mamba_mixer.out_proj": _linear_input(shapes.tokens, shapes.ssm_channels, shapes, model),
    }
    rstd = 4 * shapes.tokens * model.mamba_num_groups
    if _norm_apart(model):
        # GroupedRMSNorm in fp32: its input, which the square and the product save, the normed product, and rsqrt
        saved[f"{_MIXER}.mamba_mixer.norm"] = 8 * shapes.tokens * shapes.ssm_channels + rstd
    elif model.gated_norm:
        saved[f"{_MIXER}.mamba_mixer"] += rstd // model.tensor_model_parallel_size
    return saved


def _norm_apart(model: Any) -> bool:
    """Whether the gated norm is a module of its own: its groups span ranks, or are gathered behind the scan."""
    spans = model.mamba_num_groups < model.tensor_model_parallel_size
    return model.gated_norm and (spans or (model.context_parallel_size or 1) > 1)


def kept_tensors(saved: dict[str, int], shapes: RankShapes, kind: LayerKind, model: Any) -> dict[str, int]:
    """What of `saved` stays until the backward pass under selective recompute and `recompute_mixer`.

    Args:
        saved: from `saved_tensors`.
        shapes: of the rank.
        kind: of the layer.
        model: the provider.
    """
    kept, modules = dict(saved), recomputed_modules(model)
    norm_output = shapes.sharded_tokens * shapes.hidden * shapes.element
    if getattr(model, "recompute_mixer", False) and (kind.attention or kind.mamba):
        kept = {name: size for name, size in kept.items() if not name.startswith(_MIXER)}
        kept[_MIXER] = norm_output  # the checkpoint's input
    elif "core_attn" in modules and kind.attention:
        # the checkpoint's inputs; and its output, which is linear_proj's input
        elements = 2 * shapes.query + shapes.key + _kept_by_values(shapes, model)
        core = f"{_attention_module(model)}.core_attention"
        if splits_heads(model):
            # the output is counted with linear_proj already, and what travelled is sent again
            elements -= shapes.query
            del kept[f"{core}.core_attention"]
        kept[core] = shapes.tokens * elements * shapes.element
    if getattr(model, "recompute_gates", False):
        # what the gates give, which the linear layers behind them save
        if not (_norm_apart(model) or (model.context_parallel_size or 1) > 1):
            kept.pop(f"{_MIXER}.mamba_mixer.out_proj", None)
        kept.pop("mlp.linear_fc2", None)
    if "mlp" in modules and kind.mlp:
        kept = {name: size for name, size in kept.items() if name.split(".")[0] != _MLP}
        kept[_MLP] = norm_output
    if "layernorm" in modules and not _ternary(model):
        # what the norms gave is not kept, whoever saved it
        keepers = (_MIXER, f"{_attention_module(model)}.linear_qkv", f"{_MIXER}.mamba_mixer.in_proj", "mlp.linear_fc1")
        kept = {name: size for name, size in kept.items() if name not in (*keepers, _MLP) or size != norm_output}
    return kept


def _kept_by_values(shapes: RankShapes, model: Any) -> int:
    """Elements a token of the storage that core attention's values are in."""
    tp, groups = model.tensor_model_parallel_size, model.num_query_groups or model.num_attention_heads
    # `FusedRopeSelfAttention`; a provider made where there is no GPU has local layers, and the estimate is of one with
    fuses = model.apply_rope_fusion or model.transformer_impl == "local"
    fused = fuses and not (model.fused_single_qkv_rope or shapes.packed) and groups >= tp
    scale = getattr(model, "attention_in_multiplier", 1.0) * getattr(model, "attention_out_multiplier", 1.0)
    if fused or scale != 1.0:
        return shapes.key
    # a view of linear_qkv's output, of all ranks where they share groups
    return shapes.query + 2 * shapes.key if groups >= tp else tp * shapes.query + 2 * groups * shapes.key


def backward_workspace(shapes: RankShapes, kind: LayerKind, model: Any) -> dict[str, int]:
    """Bytes of the temporaries of a layer's backward pass, at their most in each of its two parts.

    Args:
        shapes: of the rank.
        kind: of the layer.
        model: the provider.

    Returns:
        By part, ``self_attention`` and ``mlp``, those that the layer has.
    """
    needs = {}
    # gradients of the residual stream, of the part's output and of its normed input
    stream = shapes.sharded_tokens * shapes.hidden * (shapes.residual + 2 * shapes.element)
    if kind.mlp:
        # the gradients of linear_fc2's input and of linear_fc1's output, and linear_fc1's weight gradient
        needs[_MLP] = stream + (shapes.tokens * 3 + 2 * shapes.hidden) * shapes.ffn * shapes.element
    if kind.attention:
        # gradients of q, k, v, of the output and of linear_qkv's output; cuDNN adds up dq in fp32
        query, key = shapes.core_query, shapes.core_key
        attention = shapes.tokens * ((3 * query + 4 * key) * shapes.element + 4 * query)
        needs[_MIXER] = stream + attention
    if kind.mamba:
        needs[_MIXER] = max(needs.get(_MIXER, 0), stream + _mamba_workspace(shapes, model))
    return needs


def _mamba_workspace(shapes: RankShapes, model: Any) -> int:
    conv = shapes.ssm_inner + 2 * shapes.ssm_bc
    # dzxbcdt, the gradients of the gated and of the scan's output; conv output and its gradient
    per_token = (shapes.in_proj + 2 * shapes.ssm_inner + 2 * conv) * shapes.element
    per_token += _triton_scan(shapes) if scan_kernels(model) == "triton" else _mamba_ssm_scan(shapes)
    # GroupedRMSNorm's backward: four fp32 tensors of its width
    norm = 16 * shapes.tokens * shapes.ssm_channels if _norm_apart(model) else 0
    return max(int(shapes.ssm_tokens * per_token), norm)


def _mamba_ssm_scan(shapes: RankShapes) -> float:
    """Bytes a token that mamba-ssm's backward holds at most."""
    return (
        # _state_passing_bwd: chunk states and their gradients in fp32, and both again in the model's dtype
        (8 + 2 * shapes.element) * shapes.ssm_inner * shapes.ssm_state / shapes.ssm_chunk
        # C·B within a chunk, fp32
        + 4 * _ssm_groups(shapes) * shapes.ssm_chunk
        # dt and its cumulative sum, fp32
        + 8 * shapes.ssm_heads
    )


def _triton_scan(shapes: RankShapes) -> float:
    """Bytes a token that `ops.ssd.kernels.scan.scan_backward` holds at its end, when it holds the most."""
    groups, chunk = _ssm_groups(shapes), shapes.ssm_chunk
    # what the kernels make in parts to be summed up, by their `launch_config`s: where there is no Triton they cannot
    # be asked. C·B's gradient has at most two, fewer in large batches
    splits = min(2, math.ceil(shapes.ssm_heads / groups / 4))
    query_parts, pair_parts = math.ceil(shapes.ssm_state / (128 if shapes.element == 2 else 32)), 2
    return (
        # chunk states and their gradients in the model's dtype
        2 * shapes.element * shapes.ssm_inner * shapes.ssm_state / chunk
        # the gradient of C·B within a chunk, fp32
        + 4 * splits * groups * chunk
        # fp32: dt, its summed decays, and what goes into their gradients
        + 4 * shapes.ssm_heads * (4 + pair_parts + query_parts)
    )


def _ssm_groups(shapes: RankShapes) -> int:
    return shapes.ssm_bc // shapes.ssm_state


def loss_workspace(shapes: RankShapes, model: Any) -> int:
    """Bytes of logits and cross entropy at their worst, on the last pipeline stage.

    Args:
        shapes: of the rank.
        model: the provider.
    """
    # final norm's input, the output layer's input and its gradient
    hidden = 3 * shapes.tokens * shapes.hidden * shapes.element
    # its gradient, or the placeholder that autograd sees where that is added to Megatron's buffer
    weight = shapes.vocab * shapes.hidden * shapes.element
    if getattr(model, "fuse_linear_cross_entropy", False):
        # linear_cross_entropy: one chunk's logits, which become their gradient; three fp32 numbers a token
        chunk = default_chunk_tokens(shapes.tokens, shapes.vocab, shapes.element)
        return chunk * shapes.vocab * shapes.element + 12 * shapes.tokens + weight + hidden
    logits = shapes.tokens * shapes.vocab
    # logits in the model's dtype; softmax and gradient in fp32
    entropy = logits * (shapes.element + 8)
    # then the masked padding's copy of the gradient, and the gradient of the output layer's weight
    output_layer = 2 * logits * shapes.element + weight
    return max(entropy, output_layer) + hidden
