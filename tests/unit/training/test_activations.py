"""The formulas of saved tensors against what autograd keeps, where Megatron's local modules save what TE's do."""

import copy

import pytest
import torch

from falcon_bridge.models.attention import FusedRopeSelfAttention
from falcon_bridge.training.activations import kept_tensors, saved_tensors
from falcon_bridge.training.memory import count_parameters, kept_bytes
from falcon_bridge.training.saved_tensors import SavedTensors
from falcon_bridge.training.shapes import layer_kinds, rank_shapes
from tests.unit.models.falcon_h1.test_model import build, run


pytestmark = pytest.mark.usefixtures("one_rank")

ALIKE = ("linear_qkv", "in_proj", "out_proj", "linear_fc1", "mlp", "linear_fc2")
LINEARS = ("linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2")
ROWS, LENGTH = 2, 23


def estimated(model, of=saved_tensors):
    """Bytes by module of all layers together, from the formulas."""
    config, sums = model.config, {}
    shapes = rank_shapes(config, ROWS, half=False)
    for kind in layer_kinds(config):
        saved = saved_tensors(shapes, kind, config)
        if of is kept_tensors:
            saved = kept_tensors(saved, shapes, kind, config)
        for name, nbytes in saved.items():
            sums[name] = sums.get(name, 0) + nbytes
    return sums


def measured(model):
    with SavedTensors(model) as saved:
        run(model)
    return saved


def small(**fields):
    return build(seq_length=LENGTH, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_pattern": "PM*-"},
        {"layer_pattern": "PPMM", "gated_norm": False, "mamba_num_groups": 1},
        {"layer_pattern": "*-*-", "mamba_num_heads": 0, "num_query_groups": 4},
        {"layer_pattern": "PM*-", "use_bitnet": True},
    ],
    ids=["all kinds", "no gated norm", "no SSM", "BitNet"],
)
def test_modules_save_what_the_formulas_say(fields):
    model = small(**fields)
    expected, found = estimated(model), by_module(measured(model), fields.get("use_bitnet"))
    compared = [name for name in expected if name.rpartition(".")[2] in ALIKE]
    assert len(compared) >= 4
    assert {name: found.get(name) for name in compared} == {name: expected[name] for name in compared}


def by_module(saved, ternary):
    found = {}
    for tensor in saved.tensors:
        name = tensor.module.partition(".layers.")[2].partition(".")[2]
        # the codes and scales of ternary weights are no activations: the estimate has them with the weights
        of_weight = ternary and name.rpartition(".")[2] in LINEARS and tensor.shape[0] != ROWS * LENGTH
        if tensor.new and not of_weight:
            found[name] = found.get(name, 0) + tensor.storage_bytes
    return found


def test_a_norm_behind_gathered_heads_keeps_fp32():
    model = small(layer_pattern="PM*-")
    name, found = "self_attention.mamba_mixer.norm", by_module(measured(model), ternary=False)
    shapes, apart = rank_shapes(model.config, ROWS, half=False), copy.copy(model.config)
    apart.context_parallel_size = 2  # as everywhere on a CPU, the norm is a module of its own then
    saved = [saved_tensors(shapes, kind, apart) for kind in layer_kinds(model.config)]
    scaled_weights = 2 * 4 * model.config.d_ssm
    assert sum(layer.get(name, 0) for layer in saved) == found[name] - scaled_weights > 0
    assert name not in estimated(model)


MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}


def test_recomputed_mlps_save_as_much_as_the_formulas_say():
    plain, recomputed = small(layer_pattern="PM*P"), small(layer_pattern="PM*P", **MLP)
    saved = measured(plain).total - measured(recomputed).total
    assert saved == sum(estimated(plain).values()) - sum(estimated(recomputed, kept_tensors).values()) > 0


@pytest.mark.parametrize("fields", [{}, MLP], ids=["mixer", "mixer and mlp"])
def test_a_recomputed_mixer_keeps_its_input(fields):
    model = small(layer_pattern="PM*-", recompute_mixer=True, **fields)
    found, expected = by_module(measured(model), ternary=False), estimated(model, kept_tensors)
    assert {name for name in found if name.startswith("self_attention")} == {"self_attention"}
    compared = [name for name in expected if name == "self_attention" or name.startswith("mlp.")]
    assert {name: found[name] for name in compared} == {name: expected[name] for name in compared}


@pytest.mark.parametrize(("method", "layers"), [("uniform", 2), ("uniform", 3), ("block", 3)])
def test_full_recompute_keeps_the_checkpoints_inputs(method, layers):
    fields = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
    model = small(layer_pattern="PM*-", **fields)
    shapes, kinds = rank_shapes(model.config, ROWS, half=False), layer_kinds(model.config)
    # without the RoPE angles, which all checkpoints share
    saved = [t for t in measured(model).tensors if t.new and t.module == "decoder" and t.shape[1] == ROWS]
    inputs = sum(tensor.storage_bytes for tensor in saved)
    last = saved_tensors(shapes, kinds[-1], model.config)
    # the last layer's input comes from a checkpoint here, and "block" does not checkpoint it
    rest = sum(last.values()) if method == "block" else 0
    assert kept_bytes(model.config, shapes, kinds) == inputs + rest


@pytest.mark.parametrize(("groups", "scale"), [(2, 1.0), (4, 1.0), (2, 0.7)])
def test_values_of_one_operation_keep_nothing_but_themselves(groups, scale):
    """Before a recomputed core attention; Megatron's are a view of linear_qkv's output, unless they are scaled."""
    fields = {"num_query_groups": groups, "attention_in_multiplier": 1.0, "attention_out_multiplier": scale}
    model = small(layer_pattern="P*--", recompute_granularity="selective", **fields)

    def kept_inputs(fused):
        for module in model.modules():
            if isinstance(module, FusedRopeSelfAttention):
                module.config.apply_rope_fusion = fused  # as on a GPU
        inputs = [tensor for tensor in measured(model).tensors if tensor.new and tensor.shape[1:2] == (ROWS,)]
        return sum(tensor.storage_bytes for tensor in inputs if tensor.module.endswith(".attention"))

    expected = []
    for packed in (True, False):
        shapes, kinds = rank_shapes(model.config, ROWS, half=False, packed=packed), layer_kinds(model.config)
        expected.append(kept_bytes(model.config, shapes, kinds))
    views, own = kept_inputs(fused=False), kept_inputs(fused=True)
    assert views - own == expected[0] - expected[1]
    assert own == 2 * ROWS * LENGTH * 4 * (64 + 2 * 16 * groups) and (views > own) == (scale == 1.0)


def test_what_comes_from_a_wrapped_model_has_the_same_names():
    model = small(layer_pattern="PM*-")
    wrapped = torch.nn.Sequential()
    wrapped.module = torch.nn.Sequential()
    wrapped.module.module = model
    with SavedTensors(wrapped) as saved:
        run(model)
    assert saved.by_module() == measured(model).by_module()


@pytest.mark.parametrize("use_bitnet", [False, True], ids=["dense", "BitNet"])
def test_falcon_edge_has_the_same_formulas(use_bitnet):
    from falcon_bridge.models.falcon_edge.provider import FalconEdgeModelProvider

    shape = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 56, "num_attention_heads": 4, "vocab_size": 131}
    shape |= {"num_query_groups": 2, "kv_channels": 16, "seq_length": LENGTH, "make_vocab_size_divisible_by": 1}
    config = FalconEdgeModelProvider(**shape, use_bitnet=use_bitnet, transformer_impl="local")
    config.finalize()
    (model,) = config.provide_distributed_model(wrap_with_ddp=False)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    found, expected = by_module(measured(model), use_bitnet), estimated(model)
    compared = ["self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"]
    assert {name: found[name] for name in compared} == {name: expected[name] for name in compared}
    assert not any("mamba" in name for name in expected)
