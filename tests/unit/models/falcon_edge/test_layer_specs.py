"""What a layer has in place of Megatron's attention and MLP, against those."""

import pytest
import torch
from megatron.core.transformer.mlp import MLP

from falcon_bridge.models import attention
from falcon_bridge.models.attention import FusedRopeSelfAttention
from falcon_bridge.models.mlp import SwiGLUMLP
from tests.unit.models.falcon_edge.test_provider import TINY, build


pytestmark = pytest.mark.usefixtures("one_rank")


def randomized(**fields):
    """A model whose every parameter is random, norms included, of activations around 1."""
    model = build(**fields)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else noise * 1.2 / parameter.shape[-1] ** 0.5)
    return model


def of_class(model, wanted):
    return [module for module in model.modules() if isinstance(module, wanted)]


def loss_and_gradients(model, rows=2, length=19):
    model.zero_grad()
    tokens = torch.randint(TINY["vocab_size"], (rows, length + 1), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(length).expand(rows, length)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_bitnet", [False, True], ids=["dense", "BitNet"])
def test_one_operation_in_front_of_core_attention_is_megatrons_steps(use_bitnet, monkeypatch):
    model = randomized(use_bitnet=use_bitnet).train()
    loss, gradients = loss_and_gradients(model)
    original, calls = attention.qkv_rope, []

    def spy(mixed_qkv, angles, value_scale):
        calls.append((tuple(mixed_qkv.shape), value_scale))
        return original(mixed_qkv, angles, value_scale)

    monkeypatch.setattr(attention, "qkv_rope", spy)
    branches = of_class(model, FusedRopeSelfAttention)
    assert len(branches) == TINY["num_layers"]
    for branch in branches:
        branch.config.apply_rope_fusion = True  # as on a GPU
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert calls == [((19, 2, 2, (4 // 2 + 2) * 16), 1.0)] * TINY["num_layers"]
    # in fp32 an int8 activation may get the code next to its own, which is less than 1 % of the row's largest
    assert fused_loss == pytest.approx(loss, rel=5e-3 if use_bitnet else 1e-6)
    for name, gradient in gradients.items():
        error = (fused_gradients[name] - gradient).norm() / gradient.norm()
        assert error <= (0.05 if use_bitnet else 1e-5), f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("use_bitnet", "dtype", "tolerance"),
    # in fp32 a last bit could give an int8 activation the code next to its own
    [(False, torch.float32, 1e-6), (False, torch.float64, 1e-14), (True, torch.float64, 1e-14)],
)
def test_the_mlp_is_megatrons(use_bitnet, dtype, tolerance):
    (mlp, *others) = of_class(randomized(use_bitnet=use_bitnet).to(dtype), SwiGLUMLP)
    assert len(others) == TINY["num_layers"] - 1
    assert not mlp.config.bias_activation_fusion  # else MLP.forward would be compiled
    x = torch.randn(7, 3, TINY["hidden_size"], generator=torch.Generator().manual_seed(5), dtype=dtype)
    found = []
    for forward in (mlp.forward, lambda x: MLP.forward(mlp, x)):
        mlp.zero_grad()
        x = x.detach().requires_grad_()
        output, bias = forward(x)
        assert bias is None
        output.square().sum().backward()
        found.append([output, x.grad, *(parameter.grad for parameter in mlp.parameters())])
    for tensor, expected in zip(*found, strict=True):
        assert (tensor - expected).norm() <= tolerance * expected.norm()


def test_a_scale_per_token_is_refused():
    (mlp, *_) = of_class(build(), SwiGLUMLP)
    with pytest.raises(ValueError, match="per_token_scale belongs to mixtures of experts"):
        mlp(torch.zeros(2, 1, TINY["hidden_size"]), torch.ones(2, 1))
