"""The elementwise kernels in Triton's interpreter, fp32 on the CPU, against their torch oracle."""

import pytest
import torch

from falcon_bridge.ops import elementwise
from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=5)


@pytest.fixture(scope="module")
def kernels():
    from falcon_bridge.ops import elementwise_kernels

    return elementwise_kernels


@interpreted
@pytest.mark.parametrize("shape", [(3, 5, 700), (1, 1, 1)])
def test_residual_and_two_terms(kernels, shape):
    residual, first = torch.randn(shape), 10 * torch.randn(shape)
    second = torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1)
    torch.testing.assert_close(kernels.residual_sum(residual, first, second), residual + first + second)


@interpreted
@pytest.mark.parametrize("shape", [(5, 2, 14), (3, 2060), (2, 0, 8)])
def test_swiglu_and_its_gradient(kernels, shape):
    x = torch.randn(shape) * 3
    grad = torch.randn(*shape[:-1], shape[-1] // 2)
    torch.testing.assert_close(kernels.swiglu(x, 0.88, 0.6), elementwise._swiglu(x, 0.88, 0.6))
    torch.testing.assert_close(
        kernels.swiglu_backward(grad, x, 0.88, 0.6), elementwise._swiglu_backward(grad, x, 0.88, 0.6)
    )
