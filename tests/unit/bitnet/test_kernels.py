"""The fused backend's kernels in Triton's interpreter, fp32 on the CPU, against the oracle."""

import pytest
import torch

from falcon_bridge.bitnet import reference
from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=6)


@pytest.fixture(scope="module")
def fused():
    from falcon_bridge.bitnet import fused

    return fused


@interpreted
@pytest.mark.parametrize(("m", "k", "n"), [(1, 16, 4), (5, 33, 7), (70, 100, 130)])
def test_codes_scales_and_products_are_the_oracles(fused, m, k, n):
    torch.manual_seed(m)
    backend = fused.FusedBackend()
    x = torch.randn(m, k) * torch.rand(m, 1) * 3
    W = torch.randn(n, k) * torch.rand(n, 1)
    segments = torch.arange(n) % 2
    weight_codes, scales = reference.quantize_weight_segmented(W, segments, 2)
    row_scales = scales[segments]
    absmax = x.abs().amax(1, keepdim=True) * 1.25

    for given in (None, absmax):
        codes, scale = backend.quantize_activation(x, given)
        expected_codes, expected_scale = reference.quantize_activation(x, given)
        assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)
    assert torch.equal(backend.quantize_weight(W, row_scales), weight_codes)
    torch.testing.assert_close(backend.abs_row_sums(W), W.double().abs().sum(1), rtol=1e-14, atol=0)
    expected = (codes.float() @ weight_codes.float().T) / (scale * row_scales)
    assert torch.equal(backend.forward(codes, scale, weight_codes, row_scales, torch.float32), expected)
    assert torch.equal(fused.dequantize(codes, scale.view(-1), torch.float32), codes.float() / scale)


@interpreted
def test_rows_longer_than_a_program_holds(fused, monkeypatch):
    monkeypatch.setattr(fused, "MAX_BLOCK_K", 32)
    x = torch.randn(3, 100) * torch.tensor([[1.0], [1e-7], [30.0]])
    x[:, 70] *= 4
    codes, scale = fused.FusedBackend().quantize_activation(x)
    expected_codes, expected_scale = reference.quantize_activation(x)
    assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_shows_in_its_rows_scale(fused, bad):
    x = torch.randn(4, 20)
    x[2, 13] = bad
    codes, scale = fused.FusedBackend().quantize_activation(x)
    assert scale.isnan().flatten().tolist() == [False, False, True, False]
    assert not codes[2].any()
