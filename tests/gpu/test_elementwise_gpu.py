"""The elementwise kernels against the same formulas in fp64."""

import pytest
import torch

from falcon_bridge.ops.elementwise import scale_segments, scaled_swiglu


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SIZES, SCALES = (1536, 1536, 128, 128, 24), (0.35, 0.25, 0.18, 0.5, 0.35)


def value_and_gradient(function, x, grad):
    x = x.detach().requires_grad_()
    y = function(x)
    return y, *torch.autograd.grad(y, x, grad.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_scaled_segments_round_once(dtype, batch_first):
    x, grad = (torch.randn(129, 3, sum(SIZES), device="cuda", dtype=dtype) for _ in range(2))
    factors = torch.tensor(SCALES, dtype=torch.float32).repeat_interleave(torch.tensor(SIZES)).cuda()
    y, dx = value_and_gradient(lambda x: scale_segments(x, SIZES, SCALES, batch_first=batch_first), x, grad)
    assert torch.equal(y, (x.float() * factors).to(dtype)) and torch.equal(dx, (grad.float() * factors).to(dtype))
    assert (y.transpose(0, 1) if batch_first else y).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(257, 2, 4096), (3, 2 * 5461)], ids=str)
def test_swiglu(dtype, shape):
    x = torch.randn(shape, device="cuda", dtype=dtype) * 3
    grad = torch.randn(*shape[:-1], shape[-1] // 2, device="cuda", dtype=dtype)
    expected = value_and_gradient(lambda x: scaled_swiglu(x, 0.88, 0.6), x.double(), grad)
    actual = value_and_gradient(lambda x: scaled_swiglu(x, 0.88, 0.6), x, grad)
    tolerance = {"rtol": 2**-8, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for value, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(value.double(), exact, **tolerance)
