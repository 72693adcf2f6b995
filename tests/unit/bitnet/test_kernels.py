"""The fused backend's kernels in Triton's interpreter, fp32 on the CPU, against the oracle."""

import pytest
import torch

from falcon_bridge.bitnet import reference
from tests.unit.bitnet import weights
from tests.unit.bitnet.weights import uneven
from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=15)


@pytest.fixture(scope="module")
def fused():
    from falcon_bridge.bitnet import fused

    return fused


@pytest.fixture
def small_tiles(fused, monkeypatch):
    kernels = fused._abs_partial_sums, fused._quantize_weight_by_sums
    for cached in kernels:
        cached.cache_clear()
    monkeypatch.setattr(fused, "_BLOCK_K", 32)
    monkeypatch.setattr(fused, "_ELEMENTWISE_TILE", {"BLOCK_N": 8, "BLOCK_K": 32, "num_warps": 1})
    yield
    for cached in kernels:
        cached.cache_clear()


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
@pytest.mark.parametrize(("kind", "most"), [("single", 2), ("gate_up", 2), ("four", 2), ("qkv", 2), ("qkv", 256)])
def test_a_weight_by_its_means_in_two_passes(fused, small_tiles, monkeypatch, kind, most):
    """With several tiles a program, tiles and programs that end inside of a matrix, and strided rows."""
    monkeypatch.setattr(fused, "_MAX_PARTIAL_SUMS", most)
    if kind == "single":
        W, segments, number = uneven(75, 50), None, 1
    elif kind == "four":
        W, segments, number = uneven(75, 50), torch.arange(75) * 7 % 4, 4
    else:
        W, segments, number = weights.fused(kind, 50)
    wide = torch.cat([W, W * 3], dim=1)
    expected, scales = reference.quantize_weight_segmented(W, segments, number)
    rows = torch.zeros(len(W), dtype=torch.int64) if segments is None else segments
    counts = rows.bincount(minlength=number).double() * W.shape[1]
    for given in (W, wide[:, :50], W.t().contiguous().t()):
        codes, row_scales = fused.FusedBackend().quantize_weight_by_mean(given, counts, segments)
        assert torch.equal(codes, expected) and codes.is_contiguous()
        assert torch.equal(row_scales, scales if segments is None else scales[segments])


@interpreted
def test_shards_of_a_weight_add_up_over_a_group(fused, monkeypatch):
    """What the all-reduce gets from each of two shards is what the whole has, and it decides the scales."""
    W, segments, number = weights.fused("qkv", 50)
    counts = segments.bincount().double() * 50
    shards = [(W[:33, :], segments[:33]), (W[33:, :], segments[33:])]
    backend, sent = fused.FusedBackend(), []
    monkeypatch.setattr(fused.dist, "all_reduce", lambda sums, group: sent.append(sums.clone()))
    for shard, own in shards:
        backend.quantize_weight_by_mean(shard, counts, own, group=object())
    whole = sent[0] + sent[1]
    expected, scales = reference.quantize_weight_segmented(W, segments, number)
    monkeypatch.setattr(fused.dist, "all_reduce", lambda sums, group: sums.copy_(whole))
    parts = [backend.quantize_weight_by_mean(shard, counts, own, group=object()) for shard, own in shards]
    assert torch.equal(torch.cat([codes for codes, _ in parts]), expected)
    assert torch.equal(torch.cat([row_scales for _, row_scales in parts]), scales[segments])


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_shows_in_its_matrix_alone(fused, bad):
    W, segments, _ = weights.fused("gate_up", 50)
    W[(segments == 1).nonzero()[3].item(), 5] = bad
    codes, row_scales = fused.FusedBackend().quantize_weight_by_mean(W, segments.bincount().double() * 50, segments)
    assert torch.equal(row_scales.isnan(), segments == 1) and not codes[segments == 1].any()
    assert codes[segments == 0].any()


@interpreted
def test_a_weight_of_zeros_keeps_a_finite_scale(fused):
    codes, row_scales = fused.FusedBackend().quantize_weight_by_mean(
        torch.zeros(9, 20), torch.tensor([180.0], dtype=torch.float64)
    )
    assert torch.equal(row_scales, torch.tensor([1e-5]).reciprocal()) and not codes.any()


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
