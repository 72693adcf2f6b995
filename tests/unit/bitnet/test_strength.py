import pytest
import torch

from falcon_bridge.bitnet.backends import ReferenceBackend
from falcon_bridge.bitnet.reference import bitlinear, quantize_activation, quantize_weight_segmented
from falcon_bridge.bitnet.strength import (
    BlendedBackend,
    at_current_strength,
    quantization_strength,
    set_quantization_strength,
)
from tests.unit.bitnet.linears import column, holding
from tests.unit.bitnet.weights import draw, fused


@pytest.fixture(autouse=True)
def full_strength_afterwards():
    yield
    set_quantization_strength(1.0)


@pytest.fixture
def gate_up(one_rank):
    """A layer, and its row segments and number of matrices."""
    W, segments, number = fused("gate_up", 48)
    return holding(column(len(W), 48, one_rank, matrices="gate_up"), W), segments, number


def outcome(linear, x, dy):
    x = x.clone().requires_grad_()
    y, _ = linear(x)
    return y.detach(), *torch.autograd.grad(y, [x, linear.weight], dy)


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.7])
def test_blended_values_are_multiplied_and_pass_gradients_on(strength, gate_up):
    linear, segments, number = gate_up
    W = linear.weight.detach()
    x, dy = draw(2, 5, 48, seed=2, std=4.0), draw(2, 5, len(W), seed=3)
    set_quantization_strength(strength)
    y, dx, dW = outcome(linear, x, dy)
    codes, scale = quantize_activation(x)
    weight_codes, scales = quantize_weight_segmented(W, segments, number)
    x_blended = (x.double() + strength * (codes.double() / scale - x)).requires_grad_()
    W_blended = (W.double() + strength * (weight_codes.double() / scales[segments][:, None] - W)).requires_grad_()
    expected = x_blended @ W_blended.T
    expected.backward(dy.double())
    for actual, exact in ((y, expected), (dx, x_blended.grad), (dW, W_blended.grad)):
        assert (actual - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_zero_is_the_dense_layer(gate_up):
    linear, _, _ = gate_up
    x = draw(7, 48)
    set_quantization_strength(0.0)
    assert torch.equal(linear(x)[0], x @ linear.weight.T)


def test_one_is_the_product_of_codes_again(gate_up):
    linear, segments, number = gate_up
    x = draw(7, 48)
    expected = bitlinear(x, linear.weight, row_segments=segments, num_segments=number)
    outputs = []
    for strength in (0.5, 1.0, 0.5, 0.999999, 1.0):
        set_quantization_strength(strength)
        outputs.append(linear(x)[0])
    assert torch.equal(outputs[1], expected) and torch.equal(outputs[4], expected)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], expected)
    assert (outputs[3] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_step_reaches_the_blended_weight(gate_up):
    linear, _, _ = gate_up
    x = draw(7, 48)
    set_quantization_strength(0.5)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    before = linear(x)[0]
    before.sum().backward()
    optimizer.step()
    other = holding(column(40, 48, linear.tp_group, matrices="gate_up"), linear.weight.detach().clone())
    assert torch.equal(linear(x)[0], other(x)[0]) and not torch.equal(linear(x)[0], before)


def test_the_codes_to_export_are_those_of_full_strength(gate_up):
    linear, segments, number = gate_up
    expected, scales = quantize_weight_segmented(linear.weight.detach(), segments, number)
    for strength in (1.0, 0.3, 1.0):
        set_quantization_strength(strength)
        linear(draw(2, 48))
        codes, row_scales = linear.weight_codes()
        assert torch.equal(codes, expected) and torch.equal(row_scales, scales[segments])


def test_blended_gradients_accumulate_in_main_grad():
    backend = BlendedBackend(ReferenceBackend(), 0.5)
    x, dy, main_grad = draw(6, 10), draw(6, 3, seed=1), torch.ones(3, 10)
    blended, ones = backend.quantize_activation(x)
    assert ones.eq(1).all()
    assert backend.grad_weight(dy, blended, ones, torch.float32, main_grad) is None
    assert torch.equal(main_grad, 1 + backend.grad_weight(dy, blended, ones, torch.float32))


def test_a_nan_shows_at_any_strength():
    x = draw(3, 10)
    x[1, 4] = float("nan")
    for strength in (0.0, 0.5):
        blended, _ = BlendedBackend(ReferenceBackend(), strength).quantize_activation(x)
        assert blended[1].isnan().any() and blended[[0, 2]].isfinite().all()


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_other_strengths_are_refused(strength):
    with pytest.raises(ValueError, match=r"must be from 0 \(dense\) to 1 \(ternary\), got"):
        set_quantization_strength(strength)
    assert quantization_strength() == 1.0


def test_full_strength_leaves_the_backend_alone():
    backend = ReferenceBackend()
    assert at_current_strength(backend) is backend
    set_quantization_strength(0.5)
    assert at_current_strength(backend) == at_current_strength(backend) == BlendedBackend(backend, 0.5)
