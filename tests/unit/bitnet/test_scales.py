import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_bridge.bitnet.reference import quantize_activation, quantize_weight, quantize_weight_segmented
from falcon_bridge.bitnet.scales import abs_sums, activation_scale, element_counts, scales_from, token_absmax
from falcon_bridge.bitnet.segments import gate_up_row_segments
from tests.unit.bitnet.weights import draw, fused, uneven


def shard_cuts(size, parts):
    """Uneven cuts too: a shard may end anywhere, also inside a head."""
    bounds = [size * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def shards_of(W, row_segments, rows, columns):
    for top, bottom in shard_cuts(W.shape[0], rows):
        for left, right in shard_cuts(W.shape[1], columns):
            yield W[top:bottom, left:right], row_segments[top:bottom]


def combined_scales(shards, num_segments):
    """What ranks compute with one all-reduce of a vector."""
    vectors = [
        torch.stack([abs_sums(W, segments, num_segments), element_counts(W, segments, num_segments)])
        for W, segments in shards
    ]
    return scales_from(*torch.stack(vectors).sum(0))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["qkv", "gate_up"]),
    in_features=st.sampled_from([1, 7, 64, 101]),
    rows=st.sampled_from([1, 2, 3, 4, 8]),
    columns=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 3),
)
def test_codes_of_shards_are_those_of_the_whole_weight(kind, in_features, rows, columns, dtype, seed):
    W, row_segments, num_segments = fused(kind, in_features, dtype=dtype, seed=seed)
    codes, scales = quantize_weight_segmented(W, row_segments, num_segments)

    shards = list(shards_of(W, row_segments, rows, columns))
    shared = combined_scales(shards, num_segments)
    assert torch.equal(shared, scales)
    pieces = [quantize_weight_segmented(part, segments, num_segments, shared)[0] for part, segments in shards]
    bands = [torch.cat(pieces[i : i + columns], dim=1) for i in range(0, len(pieces), columns)]
    assert torch.equal(torch.cat(bands), codes)


@pytest.mark.parametrize("kind", ["qkv", "gate_up"])
def test_the_weights_of_these_tests_reveal_a_wrong_scale(kind):
    """One scale a shard or one for the fused weight must change codes, or the test above could not fail."""
    W, row_segments, num_segments = fused(kind, 64)
    codes, _ = quantize_weight_segmented(W, row_segments, num_segments)
    one_scale, _ = quantize_weight(W)
    assert (one_scale != codes).double().mean() > 0.1
    for rows, columns in [(4, 1), (1, 4)]:
        shards = list(shards_of(W, row_segments, rows, columns))
        own = [quantize_weight_segmented(part, segments, num_segments)[0] for part, segments in shards]
        assert (torch.cat(own, dim=0 if rows == 4 else 1) != codes).double().mean() > 0.02


def test_gate_and_up_shards_as_megatron_cuts_them():
    """Each rank has half of gate above half of up, not a contiguous range of the fused weight."""
    W, row_segments, num_segments = fused("gate_up", 33)
    codes, scales = quantize_weight_segmented(W, row_segments, num_segments)
    gate, up = W.chunk(2)
    local_map = gate_up_row_segments(10)
    shards = [(torch.cat([gate[part], up[part]]), local_map) for part in (slice(0, 10), slice(10, 20))]
    shared = combined_scales(shards, num_segments)
    assert torch.equal(shared, scales)
    local = [quantize_weight_segmented(part, local_map, num_segments, shared)[0] for part, _ in shards]
    assert torch.equal(torch.cat([c[:10] for c in local] + [c[10:] for c in local]), codes)


def test_sums_and_counts_of_each_matrix():
    W, row_segments, num_segments = fused("qkv", 37)
    sums = abs_sums(W, row_segments, num_segments)
    counts = element_counts(W, row_segments, num_segments)
    for segment in range(num_segments):
        rows = W[row_segments == segment].double()
        assert abs(sums[segment] - rows.abs().sum()) <= 1e-13 * sums[segment]
        assert counts[segment] == rows.numel()
    assert sums.dtype == counts.dtype == torch.float64


def test_rows_that_another_rank_counts_are_left_out():
    """Two ranks share a replicated block whose std is ten times the rest's: counted twice it would move the mean."""
    own = [uneven(12, 16, seed=1), uneven(12, 16, seed=2)]
    replicated = uneven(4, 16, seed=3) * 10
    ranks = [torch.cat([part, replicated]) for part in own]
    counted = [torch.ones(16, dtype=torch.bool), torch.arange(16) < 12]
    sums, counts = (
        sum(statistic(W, counted_rows=rows) for W, rows in zip(ranks, counted, strict=True))
        for statistic in (abs_sums, element_counts)
    )
    whole = torch.cat([*own, replicated])
    assert torch.equal(scales_from(sums, counts)[0], quantize_weight(whole)[1])
    twice = scales_from(sum(abs_sums(W) for W in ranks), sum(element_counts(W) for W in ranks))
    assert abs(twice / scales_from(sums, counts) - 1) > 0.1


def test_means_are_exact_where_fp32_sums_drift():
    """Ones beside 2^26, to which fp32 can add no less than 8: in its row every one of them is lost or rounded."""
    W = torch.full((512, 512), 1.0, dtype=torch.bfloat16)
    W[0, 0] = 2.0**26
    mean = (2.0**26 + 512**2 - 1) / 512**2
    assert quantize_weight(W)[1] == 1 / torch.tensor(mean, dtype=torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_weight_spoils_its_own_matrix_only(bad):
    W, row_segments, num_segments = fused("qkv", 16)
    W[(row_segments == 1).nonzero()[3], 5] = bad
    scales = combined_scales(shards_of(W, row_segments, 2, 2), num_segments)
    assert scales.isnan().tolist() == [False, True, False]


def test_a_shard_without_rows_of_a_matrix_adds_nothing():
    sums = abs_sums(torch.ones(2, 3), torch.tensor([2, 2]), 3)
    assert sums.tolist() == [0, 0, 6]
    assert scales_from(sums, element_counts(torch.ones(2, 3), torch.tensor([2, 2]), 3))[:2].isnan().all()


@pytest.mark.parametrize("mean, scale", [(0.0, 1e5), (1e-6, 1e5), (2e-5, 5e4), (0.25, 4.0)])
def test_the_mean_has_a_floor(mean, scale):
    sums, counts = torch.tensor([mean * 8], dtype=torch.float64), torch.tensor([8.0], dtype=torch.float64)
    assert scales_from(sums, counts).item() == pytest.approx(scale, rel=1e-6)


def test_the_maximum_has_a_floor_and_must_be_finite():
    assert activation_scale(torch.tensor([0.0, 1e-6, 2e-5, 254.0])).tolist() == pytest.approx(
        [127e5, 127e5, 635e4, 0.5]
    )
    assert activation_scale(torch.tensor([float("nan"), float("inf")])).isnan().all()
    assert quantize_activation(torch.tensor([1e-6, -4e-7]))[0].tolist() == [13, -5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [2, 4])
def test_activations_split_over_features_have_the_codes_of_the_whole_row(parts, dtype):
    x = uneven(96, 24, seed=5, blocks=6).T.contiguous().to(dtype)
    codes, scale = quantize_activation(x)
    shards = x.chunk(parts, dim=-1)
    absmax = torch.stack([token_absmax(shard) for shard in shards]).amax(0)
    assert torch.equal(activation_scale(absmax), scale)
    pieces = [quantize_activation(shard, absmax) for shard in shards]
    assert torch.equal(torch.cat([piece for piece, _ in pieces], dim=-1), codes)
    own = torch.cat([quantize_activation(shard)[0] for shard in shards], dim=-1)
    assert (own != codes).double().mean() > 0.1


def test_a_nan_that_the_all_reduce_dropped_still_shows():
    x = draw(3, 8)
    x[1, 2] = float("nan")
    _, scale = quantize_activation(x, absmax=torch.full((3, 1), 4.0))
    assert scale.isnan().flatten().tolist() == [False, True, False]
