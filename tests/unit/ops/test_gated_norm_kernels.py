"""The kernels of gate and norm in Triton's interpreter, fp32 on the CPU, against their torch oracle."""

import pytest
import torch

from falcon_bridge.ops.gated_norm import gated_norm_reference
from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter


SCALES = {"gate_scale": 0.35, "out_scale": 1.7}


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=8)


@pytest.fixture(scope="module")
def kernels():
    from falcon_bridge.ops import gated_norm_kernels

    return gated_norm_kernels


def draw(batch, length, d, tail):
    """y `[b, s, d]`, z as the first columns of wider rows, the result's gradient, and a weight."""
    generator = torch.Generator().manual_seed(d + tail)
    y = 3 * torch.randn(batch, length, d, generator=generator)
    z = 2 * torch.randn(length, batch, d + tail, generator=generator)[..., :d]
    grad = torch.randn(length, batch, d, generator=generator)
    return y, z, grad, 1 + 0.3 * torch.randn(d, generator=generator)


def expected(y, z, grad, weight, **options):
    inputs = [t.detach().clone().requires_grad_() for t in (y.transpose(0, 1), z)]
    weight = None if weight is None else weight.detach().clone().requires_grad_()
    out = gated_norm_reference(*inputs, weight, **options)
    out.backward(grad)
    return out.detach(), inputs[0].grad.transpose(0, 1), inputs[1].grad, None if weight is None else weight.grad


@interpreted
@pytest.mark.parametrize(
    ("shape", "tail", "group_width"),
    [
        ((2, 3, 96), 40, None),  # no norm; row strides of 8
        ((1, 5, 1100), 13, None),  # no norm, more than a block, odd strides
        ((2, 3, 96), 40, 96),
        ((2, 3, 96), 13, 48),  # two groups
        ((3, 2, 90), 6, 30),  # three groups, not a power of two
        ((1, 1, 64), 8, 64),
    ],
)
def test_forward_and_backward(kernels, shape, tail, group_width):
    y, z, grad, weight = draw(*shape, tail)
    weight = None if group_width is None else weight
    options = {**SCALES, "group_width": group_width}
    want, dy, dz, dweight = expected(y, z, grad, weight, eps=3e-2, **options)

    out, rstd = kernels.gated_norm(y, z, weight, eps=3e-2, **options)
    torch.testing.assert_close(out, want)
    assert out.is_contiguous() and (rstd is None) == (weight is None)

    rows = torch.full((shape[1], shape[0], shape[2] + tail), 7.0)
    got_dy, got_dweight = kernels.gated_norm_backward(grad, y, z, weight, rstd, rows[..., : shape[2]], **options)
    torch.testing.assert_close(got_dy, dy)
    torch.testing.assert_close(rows[..., : shape[2]], dz)
    assert (rows[..., shape[2] :] == 7).all()
    if weight is not None:
        torch.testing.assert_close(got_dweight, dweight)


@interpreted
def test_the_weights_gradient_adds_up_over_programs_of_many_rows(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    y, z, grad, weight = draw(2, 5, 16, 8)
    want = expected(y, z, grad, weight, eps=1e-5, group_width=16, **SCALES)[3]
    _, rstd = kernels.gated_norm(y, z, weight, group_width=16, **SCALES)
    got = kernels.gated_norm_backward(grad, y, z, weight, rstd, torch.empty_like(z), group_width=16, **SCALES)[1]
    torch.testing.assert_close(got, want)


@interpreted
def test_a_group_that_no_program_can_hold(kernels):
    y, z, _, weight = draw(1, 1, 20000, 0)
    with pytest.raises(ValueError, match="groups of 20000 channels are wider than 16384: use more groups"):
        kernels.gated_norm(y, z, weight, **SCALES)
