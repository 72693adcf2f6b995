"""The output layer and loss in chunks on a GPU: exact, small, and capturable in a CUDA graph."""

import pytest
import torch
import torch.nn.functional as F

from falcon_bridge.ops import linear_cross_entropy as ops
from falcon_bridge.ops.linear_cross_entropy import linear_cross_entropy, naive_linear_cross_entropy


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

MIB = 2**20
VOCABULARIES = [(32784, 32784), (65536, 65536), (130049, 130049), (32896, 32784)]  # columns, those not padding


def draw(tokens, hidden_size, width, valid, dtype=torch.bfloat16):
    """Hidden states, weight, labels of which some are masked, and gradients.

    Logits have a standard deviation of 3: few of them make up the softmax, where bf16 keeps them to 0.03.
    """
    torch.manual_seed(width)
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=dtype)
    weight = torch.randn(width, hidden_size, device="cuda", dtype=dtype) * (3 / hidden_size**0.5)
    labels = torch.randint(valid, (tokens,), device="cuda")
    labels[::5], labels[1] = -100, valid - 1
    return hidden, weight, labels, torch.rand(tokens, device="cuda") / tokens


def value_and_gradients(function, hidden, weight, labels, grad):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), grad)


def assert_relative(actual, exact, tolerance):
    for value, reference in zip(actual, exact, strict=True):
        assert (value.float() - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize(("width", "valid"), VOCABULARIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 2e-5)], ids=str)
def test_it_is_the_definition(width, valid, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    hidden, weight, labels, grad = draw(700, 512, width, valid, dtype)
    exact = value_and_gradients(
        lambda h, w, y: naive_linear_cross_entropy(h, w, y, valid), hidden.float(), weight.float(), labels, grad
    )
    for chunk_tokens in (None, 256):
        actual = value_and_gradients(
            lambda *x, n=chunk_tokens: linear_cross_entropy(*x, vocab_size=valid, chunk_tokens=n),
            hidden, weight, labels, grad,
        )  # fmt: skip
        assert_relative(actual, exact, tolerance)
        assert not actual[2][valid:].any()


def test_kernels_are_their_oracle(monkeypatch):
    """The same bf16 logits through both: what is left is rounding in fp32, and of the gradient to bf16."""
    _, _, labels, grad = draw(300, 64, 9001, 8888)
    logits = torch.randn(300, 9024, device="cuda").mul_(4).bfloat16()[:, :9001]
    shard = ops._Shard(0, 8888, 9001, None)
    results = []
    for has_kernels in (True, False):
        monkeypatch.setattr(ops, "_has_kernels", lambda _, answer=has_kernels: answer)
        statistics, gradient = torch.empty(3, 300, device="cuda"), logits.clone()
        # the rows of a clone lie without gaps, and may not be written beyond
        padded = F.pad(gradient, (0, 23))[:, :9001]
        ops._row_statistics(padded, labels, statistics, shard)
        ops._logits_to_gradient(padded, labels, statistics[0] + statistics[1].log(), grad, shard)
        results.append((statistics, padded.float()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2**-7, atol=1e-9)


def test_accumulation_into_main_grad():
    hidden, weight, labels, grad = draw(700, 512, 32896, 32784)
    exact = value_and_gradients(
        lambda h, w, y: naive_linear_cross_entropy(h, w, y, 32784), hidden.float(), weight.float(), labels, grad
    )[2]
    for chunk_tokens in (None, 256):
        parameter = torch.nn.Parameter(weight)
        before = torch.randn(weight.shape, device="cuda") * exact.std()
        parameter.main_grad, parameter.grad_added_to_main_grad = before.clone(), False
        linear_cross_entropy(
            hidden, parameter, labels, vocab_size=32784, chunk_tokens=chunk_tokens
        ).backward(grad)  # fmt: skip
        assert parameter.grad_added_to_main_grad and parameter.grad.dtype == torch.bfloat16
        assert_relative([parameter.main_grad - before], [exact], 1e-2)


def peak_of(function, *case):
    """Bytes beyond what was allocated before, and the results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = value_and_gradients(function, *case)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, results


def with_logits(hidden, weight, labels):
    """What Megatron does: logits in bf16, the loss in fp32."""
    return F.cross_entropy((hidden @ weight.t()).float(), labels, ignore_index=-100, reduction="none")


@pytest.mark.parametrize("width", [65536, 130049])
def test_memory_is_that_of_a_chunk(width, report):
    hidden, weight, labels, grad = draw(8192, 1024, width, width)
    labels.clamp_(min=0)
    value_and_gradients(linear_cross_entropy, hidden[:128], weight, labels[:128], grad[:128])  # kernels, workspaces
    fused, actual = peak_of(linear_cross_entropy, hidden, weight, labels, grad)
    unfused, expected = peak_of(with_logits, hidden, weight, labels, grad)
    assert_relative(actual, [x.float() for x in expected], 2e-2)
    report(test="linear_cross_entropy", vocabulary=width, fused_mib=fused / MIB, unfused_mib=unfused / MIB)
    # one buffer of logits; the weight's gradient in fp32 and in bf16; the gradient of the hidden states
    chunk = ops.default_chunk_tokens(8192, width, 2)
    allowed = chunk * (width + 64) * 2 + weight.numel() * 6 + hidden.numel() * 2 + 64 * MIB
    assert fused <= allowed
    assert fused < unfused / 3


def test_it_can_be_captured_in_a_cuda_graph():
    """Nothing waits for the device, and a replay with other numbers gives what they give eagerly."""
    hidden, weight, labels, grad = draw(1000, 512, 32896, 32784)
    static = [x.clone() for x in (hidden, weight, labels, grad)]

    def step(*case):
        return value_and_gradients(lambda *x: linear_cross_entropy(*x, vocab_size=32784, chunk_tokens=384), *case)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)
    static[0].copy_(hidden.flip(0) * 0.5)
    static[2].copy_(labels.roll(7))
    graph.replay()
    eager = step(hidden.flip(0) * 0.5, weight, labels.roll(7), grad)
    torch.cuda.synchronize()
    assert_relative(captured, [value.float() for value in eager], 1e-3)
    again = step(hidden.flip(0) * 0.5, weight, labels.roll(7), grad)
    assert all(torch.equal(first, second) for first, second in zip(eager, again, strict=True))
