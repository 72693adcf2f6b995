"""The kernels between `linear_qkv` and attention in Triton's interpreter, fp32 on the CPU, against their oracle."""

import pytest
import torch

from falcon_bridge.ops.qkv_rope import qkv_rope, qkv_rope_reference
from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter


VALUE_SCALE = 0.35
SHAPES = [  # s, b, groups, query heads a group, d
    (7, 2, 2, 4, 16),
    (11, 1, 1, 3, 24),  # half a head is no power of two
    (5, 3, 3, 1, 10),  # as many groups as heads; odd strides
    (1, 1, 1, 5, 64),
]


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=9)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels with so few tokens a program that rows take several, the last one in part."""
    from falcon_bridge.ops import qkv_rope_kernels

    monkeypatch.setattr(qkv_rope_kernels, "_BLOCK", 64)
    qkv_rope_kernels._launch.cache_clear()
    yield qkv_rope_kernels
    qkv_rope_kernels._launch.cache_clear()


def rotary(positions, d, base=1e4):
    """Angles fp32 `[s, 1, 1, d]` as mcore's `RotaryEmbedding.get_emb` makes them."""
    frequencies = 1.0 / base ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    half = torch.outer(positions.float(), frequencies)
    return torch.cat((half, half), dim=-1)[:, None, None, :]


def draw(s, b, groups, heads, d):
    """mixed_qkv `[s, b, g, (heads + 2)·d]`, angles, and the gradients of q, k and v in layouts of their own."""
    generator = torch.Generator().manual_seed(s + d)
    mixed = 3 * torch.randn(s, b, groups, (heads + 2) * d, generator=generator)
    dq = torch.randn(b, groups * heads, s, d, generator=generator).permute(2, 0, 1, 3)
    dk = 2 * torch.randn(s, b, groups, d + 3, generator=generator)[..., :d]
    dv = torch.randn(d, s, b, groups, generator=generator).permute(1, 2, 3, 0)
    return mixed, rotary(5 + torch.arange(s), d), (dq, dk, dv)


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(kernels, shape):
    mixed, angles, _ = draw(*shape)
    for actual, expected in zip(
        kernels.qkv_rope(mixed, angles, VALUE_SCALE), qkv_rope_reference(mixed, angles, VALUE_SCALE), strict=True
    ):
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous()


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(kernels, shape):
    mixed, angles, grads = draw(*shape)
    outputs = qkv_rope_reference(mixed.requires_grad_(), angles, VALUE_SCALE)
    (expected,) = torch.autograd.grad(outputs, mixed, grads)
    actual = kernels.qkv_rope_backward(*grads, angles, VALUE_SCALE)
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous()


@interpreted
def test_angles_of_long_rows(kernels):
    # the first frequency is 1 whatever the base: a row of 256k tokens has angles of as many radians
    positions = torch.cat((torch.arange(40), torch.tensor([65537, 105614, 105616, 131071, 262143, 1000001])))
    angles = rotary(positions, 8, base=30.0)
    mixed = torch.zeros(len(positions), 1, 1, 3 * 8)
    mixed[..., :4], mixed[..., 12:16] = 1.0, 1.0  # q = (1, 0) and k = (0, 1) turn into columns of the rotation
    q, k, _ = kernels.qkv_rope(mixed, angles, VALUE_SCALE)
    exact = angles[:, 0, 0, :4].double()
    columns = torch.cat((exact.cos(), exact.sin()), -1), torch.cat((-exact.sin(), exact.cos()), -1)
    for actual, expected in zip((q, k), columns, strict=True):
        torch.testing.assert_close(actual[:, 0, 0].double(), expected, rtol=0, atol=2e-7)


@not_interpreted
def test_the_oracle_against_rotations_of_complex_numbers():
    mixed, angles, _ = draw(7, 2, 2, 4, 16)
    q, k, v = qkv_rope(mixed, angles, VALUE_SCALE)
    heads = mixed.double().view(7, 2, 2, 6, 16)
    turned = torch.complex(heads[..., :8], heads[..., 8:]) * torch.exp(1j * angles.double()[..., None, :8])
    turned = torch.cat((turned.real, turned.imag), dim=-1).float()
    torch.testing.assert_close(q, turned[..., :4, :].reshape(7, 2, 8, 16))
    torch.testing.assert_close(k, turned[..., 4, :])
    torch.testing.assert_close(v, VALUE_SCALE * mixed.view(7, 2, 2, 6, 16)[..., 5, :])


@not_interpreted
@pytest.mark.parametrize(
    ("mixed", "angles"),
    [
        ((6, 2, 1, 5 * 16), (5, 1, 1, 16)),  # other positions
        ((6, 2, 1, 5 * 16), (6, 2, 1, 16)),  # of each row its own
        ((6, 2, 1, 5 * 16), (6, 1, 1, 12)),
        ((6, 2, 1, 2 * 16), (6, 1, 1, 16)),  # no query head
        ((6, 2, 5 * 16), (6, 1, 1, 16)),
        ((6, 2, 1, 5 * 15), (6, 1, 1, 15)),
    ],
)
def test_shapes_that_do_not_fit(mixed, angles):
    with pytest.raises(ValueError, match=r"do not fit together: give \[s, b, groups, \(heads a group \+ 2\)·d\]"):
        qkv_rope(torch.ones(mixed), torch.ones(angles))


@not_interpreted
def test_angles_of_another_precision():
    with pytest.raises(ValueError, match=r"torch.bfloat16 angles \[6, 1, 1, 16\] do not fit together"):
        qkv_rope(torch.ones(6, 2, 1, 80), torch.ones(6, 1, 1, 16, dtype=torch.bfloat16))
