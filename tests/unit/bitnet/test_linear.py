"""The layers on one rank; several are in tests/parallel/test_bitnet.py."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers

import falcon_bridge.bitnet
from falcon_bridge.bitnet.linear import BitNetColumnParallelLinear, BitNetRowParallelLinear
from falcon_bridge.bitnet.reference import bitlinear, quantize_weight_segmented
from tests.unit.bitnet.linears import column, config, holding, row
from tests.unit.bitnet.weights import draw, fused, uneven


@pytest.mark.parametrize("kind", ["qkv", "gate_up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_layer_has_a_scale_for_each_matrix(kind, dtype, one_rank):
    W, segments, number = fused(kind, 48, dtype=dtype)
    linear = holding(column(len(W), 48, one_rank, matrices=kind, fields={"params_dtype": dtype}), W)
    x = draw(3, 2, 48, dtype=dtype)
    y, bias = linear(x)
    assert bias is None and torch.equal(y, bitlinear(x, W, row_segments=segments, num_segments=number))
    assert not torch.equal(y, bitlinear(x, W))
    codes, row_scales = linear.weight_codes()
    expected, scales = quantize_weight_segmented(W, segments, number)
    assert torch.equal(codes, expected) and torch.equal(row_scales, scales[segments])
    assert torch.equal(linear.row_segments, segments)


def layers_of_both_kinds(group, **kwargs):
    return column(9, 20, group, **kwargs), row(9, 20, group, **kwargs)


@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_bias(skip_bias_add, one_rank):
    W, b, x = uneven(9, 20), draw(9, seed=5), draw(4, 2, 20)
    for linear in layers_of_both_kinds(one_rank, bias=True, skip_bias_add=skip_bias_add):
        holding(linear, W, b)
        y, bias = linear(x)
        expected = bitlinear(x, W)
        assert torch.equal(y, expected if skip_bias_add else expected + b)
        assert (bias is linear.bias) if skip_bias_add else (bias is None)
        dy = draw(4, 2, 9, seed=6)
        (y if bias is None else y + bias).backward(dy)
        assert torch.allclose(linear.bias.grad, dy.sum((0, 1)), atol=1e-5)


def test_frozen_weights_pass_gradients_on_and_save_no_activations(one_rank):
    W = uneven(9, 20)
    for linear in layers_of_both_kinds(one_rank):
        holding(linear, W).requires_grad_(False)
        x = draw(4, 2, 20).requires_grad_()
        shapes = []

        def note(tensor, shapes=shapes):
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y, _ = linear(x)
        y.sum().backward()
        assert x.grad.any() and linear.weight.grad is None
        assert sorted(shapes) == [(1,), (9, 20)]


def test_no_gradients_no_graph(one_rank):
    linear = holding(column(9, 20, one_rank), uneven(9, 20))
    with torch.no_grad():
        assert not linear(draw(4, 20))[0].requires_grad


def test_checkpoints_are_those_of_the_dense_layers(one_rank):
    metadata = {"dp_cp_group": one_rank}
    for ours, theirs in (
        (column(9, 20, one_rank, bias=True), ColumnParallelLinear),
        (row(9, 20, one_rank, bias=True), RowParallelLinear),
    ):
        kwargs = {"input_is_parallel": True, "skip_bias_add": False} if theirs is RowParallelLinear else {}
        dense = theirs(
            20, 9, config=config(), init_method=torch.nn.init.normal_, bias=True, tp_group=one_rank, **kwargs
        )
        dense.load_state_dict({"weight": uneven(9, 20), "bias": draw(9)})
        ours.load_state_dict(dense.state_dict())
        assert torch.equal(ours.weight, dense.weight) and torch.equal(ours.bias, dense.bias)
        assert ours.state_dict().keys() == dense.state_dict().keys()
        sharded = [layer.sharded_state_dict(prefix="p.", metadata=metadata) for layer in (ours, dense)]
        assert sharded[0].keys() == sharded[1].keys()
        for name in ("p.weight", "p.bias"):
            ours_, theirs_ = (state[name] for state in sharded)
            assert (ours_.key, ours_.global_shape, ours_.global_offset) == (
                theirs_.key,
                theirs_.global_shape,
                theirs_.global_offset,
            )
        attributes = ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")
        for name in attributes:
            assert getattr(ours.weight, name) == getattr(dense.weight, name)


def test_gradient_accumulation_fusion_needs_no_apex(one_rank, monkeypatch):
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    fused_accumulation = {"gradient_accumulation_fusion": True}
    for linear in layers_of_both_kinds(one_rank, fields=fused_accumulation):
        W = uneven(9, 20)
        holding(linear, W)
        assert linear.config.gradient_accumulation_fusion
        linear.weight.main_grad, linear.weight.grad_added_to_main_grad = torch.zeros(9, 20), False
        expected = torch.zeros(9, 20)
        for seed in range(3):
            x, dy = draw(4, 2, 20, seed=seed), draw(4, 2, 9, seed=seed + 7)
            linear(x)[0].backward(dy)
            latent = W.clone().requires_grad_()
            bitlinear(x, latent).backward(dy)
            expected += latent.grad
        assert torch.equal(linear.weight.main_grad, expected) and linear.weight.grad_added_to_main_grad


def test_it_may_accumulate_where_the_other_layers_do_not(one_rank):
    shape = {"init_method": torch.nn.init.normal_, "bias": False, "tp_group": one_rank}
    for cls, kwargs in (
        (BitNetColumnParallelLinear, shape),
        (BitNetRowParallelLinear, {**shape, "input_is_parallel": True, "skip_bias_add": False}),
    ):
        for asked in (False, True):
            of_provider = config()
            of_provider.bitnet_gradient_accumulation_fusion = asked
            linear = cls(20, 9, config=of_provider, **kwargs)
            assert linear.gradient_accumulation_fusion is asked
            assert not linear.config.gradient_accumulation_fusion


@pytest.mark.parametrize("kind", ["qkv", "gate_up"])
def test_a_layer_that_was_built_on_the_meta_device(kind, one_rank):
    W, segments, number = fused(kind, 48)
    with torch.device("meta"):
        linear = column(len(W), 48, one_rank, matrices=kind)
    assert linear.weight.is_meta
    linear.to_empty(device="cpu")
    x = draw(3, 48)
    assert torch.equal(holding(linear, W)(x)[0], bitlinear(x, W, row_segments=segments, num_segments=number))


def test_process_groups_may_come_as_a_collection(one_rank):
    collection = SimpleNamespace(tp=one_rank)
    for cls, kwargs in (
        (BitNetColumnParallelLinear, {"gather_output": False, "is_expert": False, "tp_comm_buffer_name": "qkv"}),
        (BitNetRowParallelLinear, {"input_is_parallel": True, "skip_bias_add": True, "tp_comm_buffer_name": "proj"}),
    ):
        linear = cls(
            20,
            9,
            config=config(),
            init_method=torch.nn.init.normal_,
            bias=False,
            stride=1,
            pg_collection=collection,
            name="decoder.layers.0",
            **kwargs,
        )
        assert linear.tp_group is one_rank and "BitNet" in repr(linear)


def test_the_backend_of_the_config_is_asked(one_rank):
    linear = holding(column(9, 20, one_rank), uneven(9, 20))
    linear.config.bitnet_backend = "fused"
    with pytest.raises(ValueError, match="bitnet_backend='fused' needs a GPU and the weights are on cpu"):
        linear(draw(2, 20))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"is_expert": True}, "do not support mixtures of experts: set use_bitnet=False, or num_moe_experts=None"),
        ({"skip_weight_param_allocation": True}, "keeps its own weight"),
        ({"matrices": "qkv"}, "a qkv weight of 9 rows does not fit the config, by which it has 72"),
        ({"matrices": "gate_up"}, "a gate_up weight of 9 rows does not fit the config, by which it has 8"),
        ({"matrices": "kv"}, "matrices='kv' is not one of 'qkv', 'gate_up' and None"),
    ],
)
def test_what_a_column_parallel_layer_cannot_be(kwargs, message, one_rank):
    with pytest.raises(ValueError, match=message):
        column(9, 20, one_rank, **kwargs)


def test_experts_are_refused_by_the_row_parallel_layer(one_rank):
    with pytest.raises(ValueError, match="do not support mixtures of experts"):
        row(9, 20, one_rank, is_expert=True)


def test_another_weight_is_refused(one_rank):
    linear = holding(column(9, 20, one_rank), uneven(9, 20))
    with pytest.raises(ValueError, match="multiplies by its own weight"):
        linear(draw(2, 20), weight=torch.nn.Parameter(uneven(9, 20)))


def test_public_names():
    for name in falcon_bridge.bitnet.__all__:
        assert getattr(falcon_bridge.bitnet, name) is not None
    assert falcon_bridge.bitnet.BitNetColumnParallelLinear is BitNetColumnParallelLinear
    with pytest.raises(AttributeError, match="has no attribute 'BitLinear'"):
        falcon_bridge.bitnet.BitLinear  # noqa: B018
