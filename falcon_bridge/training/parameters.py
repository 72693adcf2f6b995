"""Parameters of a model, counted from its shapes: all of them, those of a rank, those of adapters."""

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from falcon_bridge.training.shapes import LayerKind, layer_kinds, padded_vocab_size


@dataclass(frozen=True)
class Linear:
    """A linear layer of a transformer layer.

    Attributes:
        module: its name within the layer.
        inputs, outputs: its features over all tensor-parallel ranks.
        column: whether its outputs are split over the ranks; its inputs where not.
    """

    module: str
    inputs: int
    outputs: int
    column: bool


def linears(model: Any, kind: LayerKind) -> list[Linear]:
    """The linear layers of a layer.

    Args:
        model: a provider.
        kind: of the layer.
    """
    hidden, found = model.hidden_size, []
    # a family without an SSM branch has its attention in the mixer's place
    mixer = "self_attention.attention" if hasattr(model, "d_ssm") else "self_attention"
    if kind.attention:
        head_dim = model.kv_channels or hidden // model.num_attention_heads
        heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
        found.append(Linear(f"{mixer}.linear_qkv", hidden, (heads + 2 * groups) * head_dim, True))
        found.append(Linear(f"{mixer}.linear_proj", heads * head_dim, hidden, False))
    if kind.mamba:
        in_proj = 2 * model.d_ssm + 2 * model.mamba_num_groups * model.mamba_state_dim + model.mamba_num_heads
        found.append(Linear("self_attention.mamba_mixer.in_proj", hidden, in_proj, True))
        found.append(Linear("self_attention.mamba_mixer.out_proj", model.d_ssm, hidden, False))
    if kind.mlp:
        found.append(Linear("mlp.linear_fc1", hidden, 2 * model.ffn_hidden_size, True))
        found.append(Linear("mlp.linear_fc2", model.ffn_hidden_size, hidden, False))
    return found


def count_parameters(model: Any) -> int:
    """Parameters of a model, without vocabulary padding; equal to what a build has.

    Args:
        model: a provider.
    """
    embeddings = model.vocab_size * model.hidden_size * (1 if model.share_embeddings_and_output_weights else 2)
    return sum(layer_parameters(model, kind) for kind in layer_kinds(model)) + embeddings + model.hidden_size


def layer_parameters(model: Any, kind: LayerKind, tp: int = 1) -> int:
    """Parameters of a layer on one of `tp` tensor-parallel ranks.

    Args:
        model: a provider.
        kind: of the layer.
        tp: how many ranks share it.
    """
    return linear_parameters(model, kind, tp) + _other_parameters(model, kind, tp)


def linear_parameters(model: Any, kind: LayerKind, tp: int = 1) -> int:
    """Those of a layer's linear layers, which `use_bitnet` makes ternary; arguments as `layer_parameters`."""
    return sum(linear.inputs * linear.outputs for linear in linears(model, kind)) // tp


def _other_parameters(model: Any, kind: LayerKind, tp: int) -> int:
    """Norms, which every rank has, and the SSM's convolution, vectors and gated norm, which are split."""
    norms = model.hidden_size * ((kind.attention or kind.mamba) + kind.mlp)
    if not kind.mamba:
        return norms
    channels = model.d_ssm + 2 * model.mamba_num_groups * model.mamba_state_dim
    gated = model.d_ssm if model.gated_norm else 0
    return norms + (channels * (model.conv_kernel + 1) + 3 * model.mamba_num_heads + gated) // tp


def stage_parameters(model: Any, layers: list[LayerKind], stage: int) -> int:
    """Parameters on a rank of a pipeline stage, vocabulary padding included.

    Args:
        model: a finalized provider.
        layers: of the stage.
        stage: its index.
    """
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    first, last = stage == 0, stage == pp - 1
    # tied embeddings on two stages are two copies
    embeddings = 1 if model.share_embeddings_and_output_weights and pp == 1 else first + last
    embedding = padded_vocab_size(model) // tp * model.hidden_size
    return (
        sum(layer_parameters(model, kind, tp) for kind in layers) + embeddings * embedding + last * model.hidden_size
    )


def adapter_parameters(model: Any, peft: Any, kind: LayerKind) -> int:
    """Parameters of a layer's adapters on one tensor-parallel rank: LoRA's A and B, DoRA's magnitudes.

    Args:
        model: a provider.
        peft: the scheme, with `target_modules` and `dim`.
        kind: of the layer.
    """
    tp, total = model.tensor_model_parallel_size, 0
    for linear in adapted(model, peft, kind):
        # both matrices are split, whatever the layer's own split is
        total += peft.dim * (linear.inputs + linear.outputs) // tp
        if type(peft).__name__ == "DoRA":
            total += linear.outputs // (tp if linear.column else 1)
    return total


def adapted(model: Any, peft: Any, kind: LayerKind) -> list[Linear]:
    """The linear layers of a layer that `peft` adapts, by the ends of their names or by wildcards."""
    return [
        linear
        for linear in linears(model, kind)
        if any(
            linear.module.rpartition(".")[2] == target or fnmatch(f"decoder.layers.0.{linear.module}", target)
            for target in peft.target_modules or ()
        )
    ]
