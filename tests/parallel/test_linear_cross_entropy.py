"""The loss without logits under tensor and sequence parallelism: against Megatron's own, and against one process."""

import logging

import pytest
import torch
import torch.distributed as dist

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.ops import linear_cross_entropy as ops
from falcon_bridge.ops.linear_cross_entropy import linear_cross_entropy
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.megatron import MegatronUnderTest
from tests.parallel.variant import Variant


T, H, WIDTH = 14, 20, 96
PADDED = {"make_vocab_size_divisible_by": 64}  # 131 to 192: with two ranks, two thirds of the second's columns
CHECKPOINTS = {"plain": {}, "groups2": {"tie_word_embeddings": True}}
LAYOUTS = [{"tp": 2}, {"tp": 2, "sequence_parallel": True}]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 11 tokens, of which no test has a multiple; ranks are forked and have them, too."""
    monkeypatch.setattr(ops, "MAX_LOGITS_BYTES", 1)
    monkeypatch.setattr(ops, "MIN_CHUNK_TOKENS", 11)


def against_megatron(vocab_size):
    """Loss and gradients of ours, of ours under sequence parallelism, and of Megatron's from logits; on each rank."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group, rank = dist.group.WORLD, dist.get_rank()
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, H, generator=generator)
    weight = torch.randn(2 * WIDTH, H, generator=generator).chunk(2)[rank]
    labels = torch.randint(0, vocab_size, (T,), generator=generator)
    # masked, before and after the vocabulary, in its padding, its last and its first token
    labels[:5] = torch.tensor([-100, 2 * WIDTH, 2 * WIDTH - 1, vocab_size - 1, 0])
    grad = torch.rand(T, generator=generator)
    own = slice(rank * T // 2, (rank + 1) * T // 2)

    def fused(hidden, weight, **options):
        return linear_cross_entropy(hidden, weight, labels, vocab_size=vocab_size, tp_group=group, **options)

    def megatron(hidden, weight):
        logits = hidden @ weight.t()
        logits[:, max(0, vocab_size - rank * WIDTH) :] = torch.finfo(logits.dtype).min
        return vocab_parallel_cross_entropy(logits, labels, tp_group=group)

    def run(function, hidden):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(*inputs)
        return loss.detach(), *torch.autograd.grad(loss, inputs, grad)

    plain, scattered = run(fused, hidden), run(lambda *x: fused(*x, sequence_parallel=True), hidden[own])
    again = run(fused, hidden)
    assert all(torch.equal(first, second) for first, second in zip(plain, again, strict=True))
    loss, grad_hidden, grad_weight = run(megatron, hidden)
    dist.all_reduce(grad_hidden, group=group)
    exact = loss, grad_hidden, grad_weight
    return [(name, *(x.numpy() for x in pair)) for name, pair in {
        "loss": (plain[0], exact[0]),
        "hidden": (plain[1], exact[1]),
        "weight": (plain[2], exact[2]),
        "loss, scattered": (scattered[0], exact[0]),
        "hidden, scattered": (scattered[1], exact[1][own]),
        "weight, scattered": (scattered[2], exact[2]),
    }.items()]  # fmt: skip


@pytest.mark.parametrize("vocab_size", [2 * WIDTH, 131, 91], ids=["whole", "padded", "a rank of padding"])
def test_it_is_megatrons_loss_of_masked_logits(vocab_size):
    for result in run_ranks(against_megatron, 2, vocab_size, device="cpu", timeout_seconds=60):
        for name, actual, exact in result:
            torch.testing.assert_close(
                *map(torch.from_numpy, (actual, exact)), rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def on_a_rank(layouts, cases):
    """Checkpoint and layout -> (loss, gradients), on rank 0."""
    logging.disable(logging.WARNING)
    results = []
    for path, batch in cases:
        for layout in layouts:
            with cpu_runtime():
                model = MegatronUnderTest(path, layout)
                results.append(model.gradients(batch))
                model.close()
    return results if dist.get_rank() == 0 else None


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    found = []
    for name, overrides in CHECKPOINTS.items():
        overrides = {"num_hidden_layers": 2, **overrides}
        path = write_random_checkpoint(tmp_path_factory.mktemp(name) / "hf", name, seed=11, **overrides)
        found.append((path, random_batch(random_config(name, **overrides), batch_size=2, seq_length=28, seed=12)))
    return found


def test_layouts_against_one_process_with_logits(cases):
    whole = Variant(fields={"fuse_linear_cross_entropy": False})
    layouts = [Variant(**layout, fields=PADDED) for layout in LAYOUTS]
    exact = run_ranks(on_a_rank, 1, [whole], cases, device="cpu", timeout_seconds=60)[0]
    fused = run_ranks(on_a_rank, 2, layouts, cases, device="cpu", timeout_seconds=60)[0]
    for i, (loss, gradients) in enumerate(fused):
        exact_loss, exact_gradients = exact[i // len(layouts)]
        assert loss == pytest.approx(exact_loss, rel=1e-6)
        assert gradients.keys() == exact_gradients.keys()
        for name, gradient in exact_gradients.items():
            assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm(), (layouts[i % len(layouts)], name)
