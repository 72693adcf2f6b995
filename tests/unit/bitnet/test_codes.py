"""When a weight is quantised: once a step, and never too late."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from falcon_bridge.bitnet import codes
from falcon_bridge.bitnet.backends import ReferenceBackend
from falcon_bridge.bitnet.codes import CodesCache, capture_id, invalidate
from falcon_bridge.bitnet.reference import bitlinear, quantize_weight, quantize_weight_segmented
from tests.unit.bitnet.linears import column, holding
from tests.unit.bitnet.weights import draw, fused, uneven


class Counting(ReferenceBackend):
    """The reference, which counts how often it quantises a weight."""

    def __init__(self):
        self.weights = 0

    def quantize_weight(self, W, row_scales):
        self.weights += 1
        return super().quantize_weight(W, row_scales)


@pytest.fixture
def cached():
    """A weight, its cache and a backend that counts; quantised once already."""
    W = torch.nn.Parameter(uneven(12, 20))
    cache, backend = CodesCache(torch.tensor([240.0], dtype=torch.float64)), Counting()
    cache.get(W, backend)
    return W, cache, backend


def assert_fresh(cached, quantised):
    W, cache, backend = cached
    codes, scales = cache.get(W, backend)
    expected, scale = quantize_weight(W.detach())
    assert torch.equal(codes, expected) and torch.equal(scales, scale.reshape(1))
    assert backend.weights == quantised


def test_nothing_is_quantised_twice(cached):
    W, cache, backend = cached
    first = cache.get(W, backend)
    assert cache.get(W, backend).codes is first.codes
    assert_fresh(cached, quantised=1)


def test_each_matrix_has_its_scale():
    W, segments, number = fused("qkv", 31)
    expected, scales = quantize_weight_segmented(W, segments, number)
    counts = segments.bincount().double() * 31
    codes, row_scales = CodesCache(counts, segments).get(W, ReferenceBackend())
    assert torch.equal(codes, expected) and torch.equal(row_scales, scales[segments])


def test_a_step_on_the_weight_itself(cached):
    W = cached[0]
    W.grad = draw(12, 20, std=0.1)
    torch.optim.SGD([W], lr=1.0).step()
    assert_fresh(cached, quantised=2)


def test_a_step_on_master_weights_whose_copy_defeats_the_version(cached):
    """As the distributed optimizer does: it steps on a shard, and writes into the buffer that W is a view of."""
    W, cache, backend = cached
    buffer = W.detach().clone().flatten()
    W.data = buffer.view(12, 20)
    cache.get(W, backend)
    version = W._version
    master = torch.nn.Parameter(buffer[:100].clone())
    master.grad = torch.ones(100)
    torch.optim.AdamW([master], lr=0.05).step()
    buffer[:100].copy_(master.detach())
    assert W._version == version
    assert_fresh(cached, quantised=3)


def test_writing_in_place(cached):
    with torch.no_grad():
        cached[0].mul_(draw(12, 20))
    assert_fresh(cached, quantised=2)


def test_new_data(cached):
    cached[0].data = uneven(12, 20, seed=5)
    assert_fresh(cached, quantised=2)


def test_invalidating(cached):
    cached[0].data.mul_(draw(12, 20))
    W, cache, backend = cached
    stale = cache.get(W, backend)
    assert not torch.equal(stale.codes, quantize_weight(W.detach())[0])  # what the call is for
    invalidate()
    assert_fresh(cached, quantised=2)


def test_another_backend(cached):
    W, cache, _ = cached
    other = Counting()
    cache.get(W, other)
    assert other.weights == 1


def test_old_codes_serve_the_backward_passes_in_flight(cached):
    W, cache, backend = cached
    old = cache.get(W, backend)
    kept = old.codes.clone()
    with torch.no_grad():
        W.mul_(-1)
    new = cache.get(W, backend)
    assert torch.equal(old.codes, kept) and not torch.equal(new.codes, kept)


def test_codes_made_in_inference_mode_serve_training(one_rank):
    linear = holding(column(12, 20, one_rank), uneven(12, 20))
    with torch.inference_mode():
        linear(draw(3, 20))
    linear(draw(3, 20).requires_grad_())[0].sum().backward()
    assert linear.weight.grad is not None


def test_loading_a_state_dict(one_rank):
    """Into weights whose version stays as it is, as for a loader that writes through `.data`."""
    linear = holding(column(12, 20, one_rank), uneven(12, 20))
    model, x, other = torch.nn.Sequential(linear), draw(3, 20), uneven(12, 20, seed=9)
    stale = linear(x)[0]
    linear.weight.data.copy_(other)
    assert torch.equal(linear(x)[0], stale)  # what the hook is for
    model.load_state_dict({}, strict=False)
    assert torch.equal(linear(x)[0], bitlinear(x, other))


def test_a_copied_layer_has_codes_of_its_own(one_rank):
    linear = holding(column(12, 20, one_rank), uneven(12, 20))
    x = draw(3, 20)
    expected = linear(x)[0]
    linear.tp_group = None  # process groups cannot be copied
    linear._codes._group = None
    other = copy.deepcopy(linear)
    with torch.no_grad():
        other.weight.copy_(uneven(12, 20, seed=4))
    assert torch.equal(linear._multiply(x, linear.weight), expected)
    assert torch.equal(other._multiply(x, other.weight), bitlinear(x, uneven(12, 20, seed=4)))


def test_once_a_step_with_micro_batches_in_flight_and_recompute(one_rank, monkeypatch):
    linear, backend = holding(column(12, 20, one_rank), uneven(12, 20)), Counting()
    monkeypatch.setattr(linear, "_backend", lambda: backend)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for step in range(3):
        # four forward passes before the first backward, as in a pipeline
        outputs = [
            checkpoint(lambda x: linear(x)[0], draw(5, 20, seed=i).requires_grad_(), use_reentrant=reentrant)
            for i, reentrant in enumerate((True, False, True, False))
        ]
        for output in outputs:
            output.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert backend.weights == step + 1


@pytest.fixture
def capturing(monkeypatch):
    """Sets the number of the CUDA graph capture that is under way; 0 ends it."""
    number = 0
    monkeypatch.setattr(codes, "capture_id", lambda device: number)

    def capture(value):
        nonlocal number
        number = value

    return capture


def test_a_capture_makes_its_own_codes_and_shares_them(cached, capturing):
    W, cache, backend = cached
    eager = cache.get(W, backend)
    capturing(7)
    first = cache.get(W, backend)
    # those from before would be as old in each replay
    assert first.codes is not eager.codes and backend.weights == 2
    for _ in range(3):  # micro-batches, and recomputation
        assert cache.get(W, backend).codes is first.codes
    assert backend.weights == 2


def test_nothing_outside_uses_the_codes_of_a_capture(cached, capturing):
    W, cache, backend = cached
    capturing(7)
    captured = cache.get(W, backend)
    capturing(0)
    # a replay may have written them for other weights
    assert cache.get(W, backend).codes is not captured.codes
    assert_fresh(cached, quantised=3)


def test_a_capture_uses_no_codes_of_another(cached, capturing):
    """A validation is captured, then a training step, with no step of the optimizer in between."""
    W, cache, backend = cached
    capturing(7)
    validation = cache.get(W, backend)
    capturing(8)
    training = cache.get(W, backend)
    assert training.codes is not validation.codes
    assert_fresh(cached, quantised=3)


def test_there_is_no_capture_on_a_cpu():
    assert capture_id(torch.device("cpu")) == 0


@pytest.mark.parametrize("segments", [torch.tensor([0, 1, 3]), torch.tensor([-1, 0, 1])])
def test_a_row_of_no_matrix_is_refused(segments):
    with pytest.raises(ValueError, match="must lie in 0 … 2 for 3 segments"):
        CodesCache(torch.ones(3, dtype=torch.float64), segments)


def test_megatron_fsdp_is_refused(cached):
    W, cache, backend = cached
    W.__fsdp_param__ = True
    invalidate()
    with pytest.raises(ValueError, match=r"do not support Megatron FSDP.*ddp.use_megatron_fsdp=False"):
        cache.get(W, backend)
