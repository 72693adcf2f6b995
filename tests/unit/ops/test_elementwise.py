import math

import pytest
import torch

from falcon_bridge.ops.elementwise import residual_sum, scale_segments, scaled_swiglu


SIZES, SCALES = (5, 3, 0, 7, 1), (0.35, -1.6, 3.0, 1.0, 0.01)
# once rounded to bf16 they are off by 2e-3 and 1e-3
GATE, OUT = 1 / 3, 0.7


def draw(*shape, seed=0, std=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def naive_scale(x, sizes, scales):
    return torch.cat([part * scale for part, scale in zip(x.split(sizes, -1), scales, strict=True)], -1)


def naive_swiglu(x, gate_scale, out_scale):
    gate, up = x.chunk(2, -1)
    gate = gate * gate_scale
    return gate / (1 + torch.exp(-gate)) * up * out_scale


def value_and_gradient(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy.to(y.dtype))[0]


def relative(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def non_contiguous(x):
    """The same values, laid out otherwise: a transpose, as in a [b, s, h] view of [s, b, h], of a wider buffer."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype)
    laid_out = wide.transpose(0, 1)[..., 1 : x.shape[-1] + 1]
    laid_out.copy_(x.transpose(0, 1))
    view = laid_out.transpose(0, 1)
    assert not view.is_contiguous()
    return view


LAYOUTS = [lambda x: x, non_contiguous]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_segments_are_scaled_each_by_its_own(layout):
    x, dy = layout(draw(4, 3, 16)), layout(draw(4, 3, 16, seed=1))
    y, dx = value_and_gradient(lambda x: scale_segments(x, SIZES, SCALES), x, dy)
    assert torch.equal(y, naive_scale(x, SIZES, SCALES))
    assert torch.equal(dx, naive_scale(dy, SIZES, SCALES))
    assert y.is_contiguous()


def test_gradcheck_of_scaled_segments():
    x = draw(2, 3, 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: scale_segments(x, SIZES, SCALES), (x,))


def test_scaling_leaves_its_input_alone():
    x = draw(4, 16)
    before = x.clone()
    y = scale_segments(x, SIZES, SCALES)
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()


def test_scales_of_one_cost_nothing():
    x = draw(4, 16)
    assert scale_segments(x, SIZES, [1.0] * len(SIZES)) is x


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_and_its_terms_are_added_in_the_residuals_dtype(terms, dtype):
    residual = draw(4, 3, 16, dtype=dtype).requires_grad_()
    added = [draw(4, 3, 16, seed=1 + i, std=10**i, dtype=torch.bfloat16).requires_grad_() for i in range(terms)]
    out = residual_sum(residual, *added)
    assert torch.equal(out, sum((term.float() for term in added), residual.float()).to(dtype))
    grad = draw(4, 3, 16, seed=9, dtype=dtype)
    out.backward(grad)
    for tensor in (residual, *added):
        assert torch.equal(tensor.grad, grad.to(tensor.dtype))


@pytest.mark.parametrize("sizes", [(5, 3), (16, 1)])
def test_segments_that_do_not_cover_the_row_are_an_error(sizes):
    with pytest.raises((RuntimeError, ValueError)):
        scale_segments(draw(4, 16), sizes, (0.5, 0.25))


def test_fewer_scales_than_segments_are_an_error():
    with pytest.raises(ValueError, match="4 scales"):
        scale_segments(draw(4, 16), SIZES, SCALES[:-1])


@pytest.mark.parametrize("scale", [GATE, 0.1, 0.03125 / 3])
def test_a_multiplier_is_not_rounded_to_bf16(scale):
    """One rounding, that of the product: all elements are the nearest bf16 to x·scale, forward and backward."""
    x = draw(64, 40, std=3.0, dtype=torch.bfloat16)
    dy = draw(64, 40, seed=1, dtype=torch.bfloat16)
    y, dx = value_and_gradient(lambda x: scale_segments(x, (40,), (scale,)), x, dy)
    assert torch.equal(y, (x.double() * scale).bfloat16())
    assert torch.equal(dx, (dy.double() * scale).bfloat16())
    rounded = torch.tensor(scale).bfloat16().double()
    assert not torch.equal(y, (x.double() * rounded).bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("gate_scale", "out_scale"), [(1.0, 1.0), (GATE, OUT), (2.5, -0.0325520833)])
def test_scaled_swiglu_is_the_formula(layout, gate_scale, out_scale):
    x, dy = layout(draw(4, 3, 22, std=4.0)), layout(draw(4, 3, 11, seed=1))
    y, dx = value_and_gradient(lambda x: scaled_swiglu(x, gate_scale, out_scale), x, dy)
    expected, gradient = value_and_gradient(lambda x: naive_swiglu(x, gate_scale, out_scale), x, dy)
    assert relative(y, expected) < 1e-14
    assert relative(dx, gradient) < 1e-14


def test_gradcheck_of_scaled_swiglu():
    x = draw(2, 3, 10, std=2.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: scaled_swiglu(x, GATE, OUT), (x,))


def test_swiglu_gate_comes_first():
    x = torch.cat([torch.full((1, 3), 2.0), torch.full((1, 3), 5.0)], -1)
    torch.testing.assert_close(scaled_swiglu(x), torch.full((1, 3), 2.0 / (1 + math.exp(-2.0)) * 5.0))


def test_swiglu_of_large_gates_is_finite():
    x = torch.tensor([[-1e4, 1e4, 88.0, -3e38, 2.0, -2.0, 1.0, 1.0]])
    y, dx = value_and_gradient(scaled_swiglu, x, torch.ones(1, 4))
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert y[0, 0] == 0
    assert y[0, 1] == -2e4


@pytest.mark.parametrize(("gate_scale", "out_scale"), [(GATE, 1.0), (1.0, OUT), (GATE, OUT)])
def test_swiglu_in_bf16_rounds_once(gate_scale, out_scale):
    """Computed in fp32 and rounded at the end: the nearest bf16 to the fp64 formula, but for a few near-ties."""
    x = draw(64, 60, std=3.0, dtype=torch.bfloat16)
    dy = draw(64, 30, seed=1, dtype=torch.bfloat16)
    y, dx = value_and_gradient(lambda x: scaled_swiglu(x, gate_scale, out_scale), x, dy)
    exact = value_and_gradient(lambda x: naive_swiglu(x, gate_scale, out_scale), x.double(), dy.double())
    rounded_multipliers = [torch.tensor(scale).bfloat16().item() for scale in (gate_scale, out_scale)]
    off = value_and_gradient(lambda x: naive_swiglu(x, *rounded_multipliers), x.double(), dy.double())
    for actual, expected, rounded in zip((y, dx), exact, off, strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual == expected.bfloat16()).double().mean() > 0.999
        assert (actual == rounded.bfloat16()).double().mean() < 0.95


def test_swiglu_saves_its_input_only():
    x = draw(4, 10).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scaled_swiglu(x, GATE, OUT)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]
