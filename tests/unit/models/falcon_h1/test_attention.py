"""The attention branch with one operation in front of core attention, against Megatron's split, RoPE and a product."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from falcon_bridge.models import attention
from falcon_bridge.models.falcon_h1.attention import FalconH1SelfAttention
from tests.unit.models.falcon_h1.test_model import build, mean_loss_and_gradients, run


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def fused(monkeypatch):
    """``fused(model)`` has its attention fused, which else only a GPU's has; the list is of what it is called with."""
    calls = []

    def spy(mixed_qkv, angles, value_scale):
        calls.append((tuple(mixed_qkv.shape), tuple(angles.shape), value_scale))
        return original(mixed_qkv, angles, value_scale)

    original = attention.qkv_rope
    monkeypatch.setattr(attention, "qkv_rope", spy)

    def switch(model):
        for module in branches(model):
            module.config.apply_rope_fusion = True
        return calls

    return switch


def branches(model):
    return [module for module in model.modules() if isinstance(module, FalconH1SelfAttention)]


@pytest.mark.parametrize(
    ("fields", "forwards"),
    [
        ({"num_layers": 2}, 1),
        ({"num_layers": 2, "num_query_groups": 4, "mamba_num_heads": 0}, 1),
        ({"num_layers": 2, "recompute_mixer": True}, 2),
        ({"num_layers": 2, "recompute_granularity": "selective"}, 1),
        (
            {
                "num_layers": 2,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
                "attention_in_multiplier": 1.0,
                "attention_out_multiplier": 1.0,
            },
            2,
        ),
    ],
    ids=["plain", "groups of one head", "recompute_mixer", "core_attn", "full recompute"],
)
def test_losses_and_gradients_are_those_of_megatrons_steps(fused, fields, forwards):
    model = build(**fields).train()
    loss, gradients = mean_loss_and_gradients(model)
    calls = fused(model)
    assert not calls
    fused_loss, fused_gradients = mean_loss_and_gradients(model)
    (branch, *_), groups = branches(model), model.config.num_query_groups
    scale = model.config.attention_in_multiplier * model.config.attention_out_multiplier
    assert calls == [((23, 2, groups, (4 // groups + 2) * 16), (23, 1, 1, 16), scale)] * 2 * forwards
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)
    assert branch._angles is None


def test_below_the_first_trained_weight_of_a_frozen_model(fused):
    model = build(num_layers=2)
    _, expected = mean_loss_and_gradients(model)
    trained = branches(model)[1].linear_qkv.weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is trained)
    fused(model)
    _, gradients = mean_loss_and_gradients(model)
    (name,) = (name for name, gradient in gradients.items() if gradient is not None)
    assert name.endswith("1.self_attention.attention.linear_qkv.weight")
    torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6)


def test_angles_do_not_outlive_a_pass_that_fails(fused, monkeypatch):
    model = build(num_layers=1)
    fused(model)
    (branch,) = branches(model)

    def fail(*args, **kwargs):
        assert branch._angles is not None
        raise RuntimeError("out of memory")

    monkeypatch.setattr(branch.core_attention, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model)
    assert branch._angles is None


def test_what_stays_with_megatron(fused):
    model = build(num_layers=1)
    fused(model)
    (branch,) = branches(model)
    angles = torch.zeros(5, 1, 1, 16)
    assert branch._fuses(angles)
    assert not branch._fuses(None)  # taken by what puts rows together, behind the split
    assert not branch._fuses((angles, angles))
    assert not branch._fuses(angles, packed_seq_params=PackedSeqParams(qkv_format="thd"))
    assert not branch._fuses(angles, inference_context=object())
    branch.q_layernorm = torch.nn.Identity()
    assert not branch._fuses(angles)
    branch.q_layernorm, branch.world_size = None, 4
    assert not branch._fuses(angles)  # two groups on four ranks
