"""The elementwise kernels in Triton's interpreter, fp32 on the CPU, against their torch oracle."""

import pytest
import torch

from falcon_bridge.ops import elementwise
from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter


SIZES, SCALES = (700, 0, 400, 37), (0.35, 2.0, 1.0, 0.1)


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=5)


@pytest.fixture(scope="module")
def kernels():
    from falcon_bridge.ops import elementwise_kernels

    return elementwise_kernels


@interpreted
@pytest.mark.parametrize("batch_first", [False, True])
def test_scaled_columns(kernels, batch_first):
    x = torch.randn(2, 3, sum(SIZES)).transpose(0, 1)
    out = kernels.scale_columns(x, SIZES, SCALES, batch_first)
    assert torch.equal(out, elementwise._scaled(x, SIZES, SCALES))
    assert (out.transpose(0, 1) if batch_first else out).is_contiguous()


@interpreted
@pytest.mark.parametrize("shape", [(5, 2, 14), (3, 2060), (2, 0, 8)])
def test_swiglu_and_its_gradient(kernels, shape):
    x = torch.randn(shape) * 3
    grad = torch.randn(*shape[:-1], shape[-1] // 2)
    torch.testing.assert_close(kernels.swiglu(x, 0.88, 0.6), elementwise._swiglu(x, 0.88, 0.6))
    torch.testing.assert_close(
        kernels.swiglu_backward(grad, x, 0.88, 0.6), elementwise._swiglu_backward(grad, x, 0.88, 0.6)
    )
