"""Outputs that are computed again before the backward pass reads them: what is held when, and the same gradients."""

import weakref

import pytest
import torch

from falcon_bridge.ops.elementwise import recompute_scaled_swiglu, scaled_swiglu
from falcon_bridge.ops.recomputed import recompute_before_backward_of


MULTIPLIERS = {"gate_scale": 0.7, "out_scale": 1.3}


class Block:
    """Two linear layers around a SwiGLU whose output may be computed again."""

    def __init__(self, recompute: bool = True, frozen: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, first, second = (torch.randn(*n, generator=generator) for n in ((5, 3), (3, 14), (7, 4)))
        self.weights = [weight.requires_grad_(not frozen) for weight in (first, second)]
        self.recompute, self.times = recompute, 0

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.weights
        gate_up = self.x @ first
        gated = scaled_swiglu(gate_up, **MULTIPLIERS)
        result = gated @ second
        kept = gate_up.detach()
        self.kept, self.gated = weakref.ref(kept), weakref.ref(gated)

        def again(y: torch.Tensor) -> None:
            self.times += 1
            recompute_scaled_swiglu(y, kept, **MULTIPLIERS)

        if self.recompute:
            recompute_before_backward_of(result, gated, again)
        return result, gated

    def gradients(self, result: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(result.square().sum(), self.weights, **options)


def test_gradients_are_the_same_and_nothing_is_held_in_between():
    block, plain = Block(), Block(recompute=False)
    result, gated = block()
    assert gated.untyped_storage().nbytes() == 0 and block.times == 0
    gradients, expected = block.gradients(result), plain.gradients(plain()[0])
    assert block.times == 1
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_a_second_backward_pass_finds_what_the_first_has_computed():
    block = Block()
    result, _ = block()
    first, second = (block.gradients(result, retain_graph=True) for _ in range(2))
    assert block.times == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_forward_passes_may_be_in_flight_together():
    block = Block()
    results = [block()[0], block()[0]]
    expected = block.gradients(block()[0])
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(block.gradients(result), expected, strict=True))


def test_a_result_that_lives_on_holds_nothing_after_the_backward_pass():
    """Training loops keep the last loss while they compute the next, and with it all of autograd's hooks."""
    block = Block()
    result = block()[0]
    assert block.kept() is not None
    block.gradients(result)
    assert block.kept() is None and block.gated() is None


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_freed_where_no_backward_pass_will_come(frozen):
    block = Block(frozen=frozen)
    with torch.set_grad_enabled(frozen):
        result, gated = block()
    torch.testing.assert_close(gated @ block.weights[1], result)
