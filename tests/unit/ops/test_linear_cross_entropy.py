"""The output layer and loss in chunks against the definition; their Triton kernels, interpreted, against torch."""

import pytest
import torch

from falcon_bridge.ops import linear_cross_entropy as ops
from falcon_bridge.ops.linear_cross_entropy import (
    default_chunk_tokens,
    linear_cross_entropy,
    naive_linear_cross_entropy,
)
from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter


T, H, V, VALID = 37, 12, 91, 83


def draw(dtype=torch.float64, tokens=T, width=V, valid=VALID, logit_std=4.0, seed=0):
    """Hidden states, weight, labels of which some are masked, and gradients of the tokens' losses, some of them 0."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = (randn(tokens, H) * 2.0 + 0.3).to(dtype)
    weight = (randn(width, H) * (logit_std / 2.0 / H**0.5)).to(dtype)
    labels = torch.randint(0, valid, (tokens,), generator=generator)
    labels[::7] = -100
    labels[3], labels[4] = valid - 1, 0
    grad = randn(tokens).abs()
    grad[5::7] = 0.0
    return hidden, weight, labels, grad


def value_and_gradients(function, hidden, weight, labels, grad):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), grad.to(loss.dtype))


def expected(hidden, weight, labels, grad, vocab_size=VALID):
    return value_and_gradients(
        lambda h, w, y: naive_linear_cross_entropy(h, w, y, vocab_size), hidden.double(), weight.double(), labels, grad
    )


def fused(**options):
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, **options)


def assert_relative(actual, exact, tolerance):
    for value, reference in zip(actual, exact, strict=True):
        assert value.shape == reference.shape
        assert (value.double() - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("chunk_tokens", [None, 1, 8, T - 1, T, 10 * T])
@pytest.mark.parametrize("vocab_size", [None, V, VALID, 84])
def test_it_is_the_definition(chunk_tokens, vocab_size):
    case = draw()
    actual = value_and_gradients(fused(vocab_size=vocab_size, chunk_tokens=chunk_tokens), *case)
    assert_relative(actual, expected(*case, vocab_size=vocab_size or V), 1e-13)
    assert not actual[2][vocab_size or V :].any()


def test_gradcheck():
    hidden, weight, labels, _ = draw(tokens=5, width=9, valid=8)
    labels = labels.clamp(min=0)  # what is no token has a gradient that is not its loss's
    function = lambda h, w: linear_cross_entropy(h, w, labels, vocab_size=8, chunk_tokens=2)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_lower_precisions(dtype, tolerance, chunk_tokens):
    case = draw(dtype)
    loss, grad_hidden, grad_weight = value_and_gradients(fused(vocab_size=VALID, chunk_tokens=chunk_tokens), *case)
    assert loss.dtype == torch.float32 and grad_hidden.dtype == grad_weight.dtype == dtype
    assert_relative((loss, grad_hidden, grad_weight), expected(*case), tolerance)


def test_chunks_are_added_up_in_fp32():
    """256 chunks with equal contributions of which each is below half a unit in the last place of their bf16 sum."""
    hidden, weight = torch.full((256, 1), 1.0, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    grad = torch.full((256,), 2.0**-9 * 1.25)
    grad[-1] = 2.0  # the backward pass starts with the last chunk
    case = (hidden, weight, torch.zeros(256, dtype=torch.long), grad)
    actual = value_and_gradients(fused(chunk_tokens=1), *case)[2]
    assert torch.equal(actual, torch.tensor([[-0.5], [0.5]]).mul(grad.sum()).bfloat16())


def test_large_logits_are_finite():
    hidden, weight, labels, grad = draw(torch.float32)
    case = (hidden * 1e4, weight, labels, grad)
    actual = value_and_gradients(fused(vocab_size=VALID, chunk_tokens=8), *case)
    assert all(value.isfinite().all() for value in actual)
    assert_relative(actual, expected(*case), 1e-5)


def test_a_nan_shows():
    hidden, weight, labels, grad = draw(torch.float32)
    hidden[2, 0] = torch.nan
    loss, grad_hidden, _ = value_and_gradients(fused(vocab_size=VALID), hidden, weight, labels, grad)
    assert loss[2].isnan() and loss.isnan().sum() == 1
    assert grad_hidden[2].isnan().all() and grad_hidden.isnan().sum() == H


@pytest.mark.parametrize("needed", [0, 1])
def test_a_gradient_that_nobody_wants_is_not_computed(needed, monkeypatch):
    if needed == 0:
        monkeypatch.setattr(ops, "_WeightGradient", None)  # a frozen head
    inputs = list(draw()[:2])
    inputs[needed].requires_grad_()
    _, _, labels, grad = draw()
    linear_cross_entropy(*inputs, labels, vocab_size=VALID, chunk_tokens=8).backward(grad)
    assert_relative([inputs[needed].grad], [expected(*(x.detach() for x in inputs), labels, grad)[1 + needed]], 1e-13)
    assert inputs[1 - needed].grad is None


@pytest.mark.parametrize("chunk_tokens", [None, 8])
@pytest.mark.parametrize(
    ("dtype", "main_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_accumulation_into_main_grad(chunk_tokens, dtype, main_dtype, tied):
    hidden, weight, labels, grad = draw(dtype)
    exact = expected(hidden, weight, labels, grad)[2]
    weight = torch.nn.Parameter(weight)
    before = torch.randn(weight.shape) * exact.std()
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = before.to(main_dtype), False, tied
    before = weight.main_grad.double().clone()
    linear_cross_entropy(hidden, weight, labels, vocab_size=VALID, chunk_tokens=chunk_tokens).backward(grad)
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape and weight.grad.dtype == dtype
    if tied:
        assert not weight.grad.any()
    assert_relative([weight.main_grad - before], [exact], 1e-6 if dtype == torch.float32 else 1e-2)


def test_a_second_backward_pass_gives_the_same():
    hidden, weight, labels, grad = draw(torch.float32)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VALID, chunk_tokens=8)
    first, second = (torch.autograd.grad(loss, (hidden, weight), grad, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_gradients_of_one_number_and_of_no_tokens():
    hidden, weight, labels, _ = draw()
    case = (hidden, weight, labels, torch.ones(()).expand(T))
    assert_relative(value_and_gradients(fused(vocab_size=VALID, chunk_tokens=8), *case), expected(*case), 1e-13)
    loss, grad_hidden, grad_weight = value_and_gradients(fused(), hidden[:0], weight, labels[:0], torch.ones(0))
    assert loss.shape == (0,) and grad_hidden.shape == (0, H) and not grad_weight.any()


def test_logits_of_a_chunk_are_all_that_is_held(monkeypatch):
    sizes = []
    buffer = ops._logits_buffer
    monkeypatch.setattr(ops, "_logits_buffer", lambda *args: sizes.append(args[2]) or buffer(*args))
    saved = []
    hidden, weight, labels, grad = draw(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = linear_cross_entropy(hidden, weight.requires_grad_(), labels, chunk_tokens=8)
    loss.backward(grad)
    assert sizes == [8]  # once for both passes
    assert saved == [hidden.numel(), weight.numel(), T, T]


@pytest.mark.parametrize(
    ("tokens", "columns", "chunk"),
    [
        (6141, 32784, 6141),
        (6142, 32784, 3072),
        (16384, 32784, 5504),
        (16384, 65536, 2816),
        (16384, 261120, 1024),
        (0, 32784, 1),
    ],
)
def test_default_chunks(tokens, columns, chunk):
    assert default_chunk_tokens(tokens, columns, 2) == chunk


@pytest.mark.parametrize("shapes", [((4, 3), (7, 2), (4,)), ((4, 3), (7, 3), (5,)), ((2, 2, 3), (7, 3), (4,))])
def test_shapes_that_do_not_fit(shapes):
    hidden, weight, labels = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, labels.long())


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=6)


@pytest.fixture(scope="module")
def kernels():
    from falcon_bridge.ops import linear_cross_entropy_kernels

    return linear_cross_entropy_kernels


# more columns than a block, an odd number: the first rank, one in the middle, one with padding, one of nothing else
SHARDS = [(0, 4500), (4499, 4499), (8998, 4101), (13497, 0)]


@interpreted
@pytest.mark.parametrize(("first", "valid"), SHARDS)
def test_kernels(kernels, first, valid):
    width, rows, stride = min(4499, valid or 4499), 6, 4544
    shard = ops._Shard(first, min(valid, width), 5 * 4499, None)
    generator = torch.Generator().manual_seed(first)
    storage = torch.full((rows, stride), torch.nan)  # what lies between the rows must not matter
    logits = storage[:, :width]
    logits.copy_(torch.randn(rows, width, generator=generator) * 5)
    logits[1::2, 4090:] += 15  # the largest in the second block
    labels = torch.tensor([first, first + width - 1, first + max(valid - 1, 0), first - 1, -100, first + width])
    grad, log_total = torch.rand(rows, generator=generator), torch.full((rows,), 12.0)

    actual, reference = torch.full((3, rows), torch.nan), torch.empty(3, rows)
    kernels.row_statistics(logits, labels, actual, shard.first, shard.valid)
    ops._row_statistics(logits, labels, reference, shard)
    torch.testing.assert_close(actual, reference, rtol=1e-6, atol=0)

    by_torch = logits.clone()
    kernels.logits_to_gradient(logits, labels, log_total, grad, shard.first, shard.valid)
    ops._logits_to_gradient(by_torch, labels, log_total, grad, shard)
    torch.testing.assert_close(logits, by_torch, rtol=1e-5, atol=1e-12)
    assert not logits[:, shard.valid :].any()


@interpreted
@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_the_whole_with_kernels(kernels, chunk_tokens, monkeypatch):
    monkeypatch.setattr(ops, "_has_kernels", lambda x: True)
    case = draw(torch.float32)
    actual = value_and_gradients(fused(vocab_size=VALID, chunk_tokens=chunk_tokens), *case)
    assert_relative(actual, expected(*case), 1e-6)
