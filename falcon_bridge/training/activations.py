"""Bytes that a layer keeps for its backward pass on a GPU, tensor by tensor.

Keys are the names of the modules that save the tensors, so that `saved_tensors.SavedTensors` can be held against them.
A tensor that two modules save is counted where it is saved first. The code paths are those of
``transformer_impl="transformer_engine"`` with mamba-ssm's fused kernel and no dropout.
"""

from typing import Any

from falcon_bridge.training.shapes import LayerKind, RankShapes


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
    if kind.attention:
        saved |= _attention(shapes, model)
        saved[f"{_attention_module(model)}.linear_qkv"] = norm_output
    if kind.mamba:
        saved |= _mamba(shapes, model)
        if not kind.attention or _ternary(model):  # else one tensor serves both branches
            saved[f"{_MIXER}.mamba_mixer.in_proj"] = norm_output
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
    # head; linear_proj's input is that output
    elements, module = 2 * shapes.query + 2 * shapes.key, _attention_module(model)
    saved = {f"{module}.core_attention": shapes.tokens * (elements * shapes.element + 4 * shapes.heads)}
    if _ternary(model):
        saved[f"{module}.linear_proj"] = _linear_input(shapes.tokens, shapes.query, shapes, model)
    return saved


def _mamba(shapes: RankShapes, model: Any) -> dict[str, int]:
    # MambaSplitConv1dScanCombinedFn: zxbcdt as [b, s, ·], and out_x, the scan's output before the gate; conv output,
    # dt, chunk states and C·B are computed again in its backward
    saved = {
        f"{_MIXER}.mamba_mixer": shapes.ssm_tokens * (shapes.in_proj + shapes.ssm_inner) * shapes.element,
        f"{_MIXER}.mamba_mixer.out_proj": _linear_input(shapes.tokens, shapes.ssm_channels, shapes, model),
    }
    if model.gated_norm:
        # GroupedRMSNorm in fp32: its input, which the square and the product save, the normed product, and rsqrt
        saved[f"{_MIXER}.mamba_mixer.norm"] = shapes.tokens * (8 * shapes.ssm_channels + 4 * model.mamba_num_groups)
    return saved


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
        # the checkpoint's inputs, of which v is a view that keeps the whole of linear_qkv's output; and its output,
        # which is linear_proj's input
        elements = shapes.query + shapes.key + (shapes.query + 2 * shapes.key) + shapes.query
        kept[f"{_attention_module(model)}.core_attention"] = shapes.tokens * elements * shapes.element
    if "mlp" in modules and kind.mlp:
        kept = {name: size for name, size in kept.items() if name.split(".")[0] != _MLP}
        kept[_MLP] = norm_output
    if "layernorm" in modules and not _ternary(model):
        # what the norms gave is not kept, whoever saved it
        keepers = (_MIXER, f"{_attention_module(model)}.linear_qkv", f"{_MIXER}.mamba_mixer.in_proj", "mlp.linear_fc1")
        kept = {name: size for name, size in kept.items() if name not in (*keepers, _MLP) or size != norm_output}
    return kept


def recomputed_modules(model: Any) -> set[str]:
    """The names in force of Megatron's selective recompute."""
    return set(model.recompute_modules or ["core_attn"]) if model.recompute_granularity == "selective" else set()


def backward_workspace(shapes: RankShapes, kind: LayerKind, model: Any) -> int:
    """Bytes of the temporaries of the part of a layer whose backward needs most.

    Args:
        shapes: of the rank.
        kind: of the layer.
        model: the provider.
    """
    needs = [0]
    if kind.mlp:
        # the gradients of linear_fc2's input and of linear_fc1's output, and linear_fc1's weight gradient
        needs.append((shapes.tokens * 3 + 2 * shapes.hidden) * shapes.ffn * shapes.element)
    if kind.attention:
        # gradients of q, k, v, of the output and of linear_qkv's output; cuDNN adds up dq in fp32
        needs.append(shapes.tokens * ((3 * shapes.query + 4 * shapes.key) * shapes.element + 4 * shapes.query))
    if kind.mamba:
        needs.append(_mamba_workspace(shapes, model))
    return max(needs)


def _mamba_workspace(shapes: RankShapes, model: Any) -> int:
    conv = shapes.ssm_inner + 2 * shapes.ssm_bc
    groups = shapes.ssm_bc // shapes.ssm_state
    per_token = (
        # dzxbcdt; conv output, its gradient and the convolution's
        (shapes.in_proj + 3 * conv) * shapes.element
        # _chunk_state_fwd and _chunk_scan_bwd_dstates in fp32, and both again in the model's dtype
        + (8 + 2 * shapes.element) * shapes.ssm_inner * shapes.ssm_state / shapes.ssm_chunk
        # C·B and its gradient within a chunk, fp32
        + 8 * groups * shapes.ssm_chunk
        # dt, its cumulative sums and their gradients, fp32
        + 24 * shapes.ssm_heads
    )
    scan = shapes.ssm_tokens * per_token
    # GroupedRMSNorm's backward: four fp32 tensors of its width
    norm = shapes.tokens * shapes.ssm_channels * 16 if model.gated_norm else 0
    return int(max(scan, norm))


def loss_workspace(shapes: RankShapes, model: Any) -> int:
    """Bytes of logits and cross entropy at their worst, on the last pipeline stage.

    Args:
        shapes: of the rank.
        model: the provider.
    """
    logits = shapes.tokens * shapes.vocab
    # forward: the logits, and the softmax in fp32 in the place of their fp32 copy; backward: that and the gradient
    entropy = logits * (shapes.element + 4)
    # then the masked padding's copy of the gradient, and the gradient of the output layer's weight
    output_layer = 2 * logits * shapes.element + shapes.vocab * shapes.hidden * shapes.element
    # final norm's input, the output layer's input and its gradient
    hidden = 3 * shapes.tokens * shapes.hidden * shapes.element
    return max(entropy, output_layer) + hidden
