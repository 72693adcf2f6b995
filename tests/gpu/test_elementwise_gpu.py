"""The elementwise kernels against the same formulas in fp64."""

import pytest
import torch

from falcon_bridge.ops.elementwise import residual_sum, scaled_swiglu


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def value_and_gradient(function, x, grad):
    x = x.detach().requires_grad_()
    y = function(x)
    return y, *torch.autograd.grad(y, x, grad.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_residual_and_two_terms_round_once(dtype):
    residual = torch.randn(129, 3, 1025, device="cuda", dtype=dtype)
    first, second = (torch.randn_like(residual, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    out = residual_sum(residual.requires_grad_(), first, second)
    assert torch.equal(out, (residual.float() + first.float() + second.float()).to(dtype))
    out.backward(residual.detach())
    assert torch.equal(first.grad, residual.detach().bfloat16()) and torch.equal(residual.grad, residual.detach())


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
