"""The fused backend against the oracle on GPU: codes and scales bit for bit, products exact before rounding."""

import pytest
import torch

from falcon_bridge.bitnet import reference


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SHAPES = [
    (1, 16, 4),
    (3, 33, 7),
    (64, 128, 128),
    (130, 100, 129),
    (257, 1000, 513),
    (512, 4608, 1031),
    (70_000, 64, 48),  # more rows than a grid's second dimension holds
    (8, 20_000, 32),  # longer than a program's registers hold
    (4, 131_072 + 64, 16),  # sums beyond 2^24
]


@pytest.fixture(scope="module")
def backend():
    from falcon_bridge.bitnet.fused import FusedBackend

    return FusedBackend()


def _matrices(m: int, k: int, n: int, dtype: torch.dtype):
    torch.manual_seed(m + k + n)
    x = torch.randn(m, k, device="cuda") * torch.rand(m, 1, device="cuda") * 3
    W = torch.randn(n, k, device="cuda") * torch.rand(n, 1, device="cuda")
    W[-1] = 0
    x[-1] = 0
    return x.to(dtype), W.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_scales_and_products_are_the_oracles(backend, shape, dtype):
    m, k, n = shape
    x, W = _matrices(m, k, n, dtype)
    segments = torch.arange(n, device="cuda") % 2
    num_segments = min(2, n)
    weight_codes, scales = reference.quantize_weight_segmented(W, segments, num_segments)
    row_scales = scales[segments]

    codes, scale = backend.quantize_activation(x)
    expected_codes, expected_scale = reference.quantize_activation(x)

    assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)
    assert torch.equal(backend.quantize_weight(W, row_scales), weight_codes)
    torch.testing.assert_close(backend.abs_row_sums(W), W.double().abs().sum(1), rtol=1e-14, atol=0)
    integers = codes.double() @ weight_codes.double().T  # exact: |sum| < 2^53
    expected = (integers.float() / (scale * row_scales)).to(dtype)
    assert torch.equal(backend.forward(codes, scale, weight_codes, row_scales, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_gradients_are_the_oracles_within_rounding(backend, shape, dtype):
    m, k, n = shape
    x, W = _matrices(m, k, n, dtype)
    codes, scale = reference.quantize_activation(x)
    weight_codes, scales = reference.quantize_weight_segmented(W, torch.arange(n, device="cuda") % 2, min(2, n))
    row_scales = scales[torch.arange(n, device="cuda") % 2]
    grad = torch.randn(m, n, device="cuda").to(dtype)
    expected_x = (grad.double() / row_scales) @ weight_codes.double()
    expected_weight = grad.double().T @ (codes.double() / scale)
    main_grad = torch.randn(n, k, device="cuda")
    expected_main = main_grad + expected_weight
    tolerance = 1e-3 if dtype == torch.float32 else 2**-7  # fp32 GEMMs may take TF32

    grad_x = backend.grad_input(grad, weight_codes, row_scales, dtype)
    grad_weight = backend.grad_weight(grad, codes, scale, dtype)

    assert backend.grad_weight(grad, codes, scale, dtype, main_grad) is None
    for actual, expected in ((grad_x, expected_x), (grad_weight, expected_weight), (main_grad, expected_main)):
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()
    assert grad_x.dtype == grad_weight.dtype == dtype and main_grad.dtype == torch.float32


def test_strided_input_and_given_absmax(backend):
    x = torch.randn(96, 300, device="cuda", dtype=torch.bfloat16)
    absmax = x.abs().amax(1, keepdim=True).float() * 1.5
    for view, whole in ((x[:, 100:200], absmax), (x.t(), None), (x[::3], absmax[::3])):
        codes, scale = backend.quantize_activation(view, whole)
        expected_codes, expected_scale = reference.quantize_activation(view, whole)
        assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_reaches_every_output_that_depends_on_it(backend, bad):
    x, W = _matrices(16, 256, 24, torch.bfloat16)
    x[3, 200] = bad
    weight_codes, scale_w = reference.quantize_weight(W)

    codes, scale = backend.quantize_activation(x)
    y = backend.forward(codes, scale, weight_codes, scale_w.view(1), torch.bfloat16)

    assert scale.isnan().flatten().tolist() == [row == 3 for row in range(16)]
    assert y[3].isnan().all() and not y[torch.arange(16) != 3].isnan().any()


def test_more_than_2_to_31_elements(backend):
    m, k = 70_000, 32_768  # 2.3e9
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16).expand(m, k).contiguous()
    x[-1] *= 2
    codes, scale = backend.quantize_activation(x)
    expected_codes, expected_scale = reference.quantize_activation(x[-1:])
    assert torch.equal(codes[-1:], expected_codes) and torch.equal(scale[-1:], expected_scale)
    del x
    weight_codes = torch.randint(-1, 2, (64, k), device="cuda", dtype=torch.int8)
    y = backend.forward(codes, scale, weight_codes, torch.ones(1, device="cuda"), torch.bfloat16)
    expected = reference.product_of_codes(codes[-1:], weight_codes) / scale[-1:]
    assert torch.equal(y[-1:], expected.bfloat16())
