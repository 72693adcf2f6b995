import math

import pytest
import torch

from falcon_bridge.verification.parity import BF16, FP32, compare, compare_tensors, near_tie_agreement
from falcon_bridge.verification.reference import Outcome


CONTRACT = {
    "ok",
    "params_compared",
    "params_mismatched",
    "max_abs_logit_diff",
    "max_abs_logit",
    "cosine",
    "next_token_agreement",
    "loss_hf",
    "loss_megatron",
    "layout",
    "dtype",
    "seconds",
}


def outcome(train=True):
    generator = torch.Generator().manual_seed(0)
    gradients = {"a": torch.randn(3, 4, generator=generator), "b": 1e-6 * torch.randn(5, generator=generator)}
    weights = {"a": torch.randn(3, 4, generator=generator)}
    logits = 3 * torch.randn(2, 100, 11, generator=generator)
    return Outcome(logits, 2.5, gradients, weights) if train else Outcome(logits, 2.5)


def judge(megatron, hf=None, mismatched=(), dtype="fp32", params_compared=7):
    return compare(
        hf or outcome(),
        megatron,
        params_compared=params_compared,
        mismatched=list(mismatched),
        layout={"tp": 1},
        dtype=dtype,
        seconds=1.0,
    )


def test_equal_outcomes_agree():
    result = judge(outcome())
    assert result.ok
    assert result.cosine == pytest.approx(1)
    assert (result.max_abs_logit_diff, result.max_rel_grad_diff, result.next_token_agreement) == (0, 0, 1)


def test_json_has_the_keys_of_the_contract():
    assert judge(outcome(train=False), outcome(train=False)).to_json().keys() == CONTRACT
    assert judge(outcome()).to_json().keys() == CONTRACT | {"max_rel_grad_diff", "max_rel_weight_diff"}


def _logit(o):
    o.logits[1, 3, 2] += 1.2e-5 * o.logits.abs().max()


def _loss(o):
    o.loss += 2.1e-6


def _gradient(o):
    o.gradients["b"][2] += 1.1e-4 * o.gradients["b"].abs().max()


def _weight(o):
    o.weights["a"][0, 0] += 1.1e-4 * o.weights["a"].abs().max()


def _missing(o):
    del o.gradients["a"]


def _shape(o):
    o.gradients["a"] = o.gradients["a"].T


def _nan_logit(o):
    o.logits[0, 0, 0] = math.nan


def _nan_gradient(o):
    o.gradients["a"][0, 0] = math.nan


def _nan_loss(o):
    o.loss = math.nan


@pytest.mark.parametrize(
    "spoil", [_logit, _loss, _gradient, _weight, _missing, _shape, _nan_logit, _nan_gradient, _nan_loss]
)
def test_each_fault_is_found(spoil):
    spoiled = outcome()
    spoil(spoiled)
    result = judge(spoiled)
    assert not result.ok
    assert result.findings


def test_a_mismatched_or_uncompared_weight_is_found():
    result = judge(outcome(), mismatched=["model.x"])
    assert not result.ok
    assert result.params_mismatched == 1
    assert "model.x" in result.findings[0]
    assert not judge(outcome(), params_compared=0).ok


def test_bf16_is_judged_by_cosine_and_agreement():
    near, far = outcome(), outcome()
    near.logits += 1e-3 * torch.randn(near.logits.shape, generator=torch.Generator().manual_seed(1))
    near.loss += 1e-3
    assert not judge(near).ok
    assert judge(near, dtype="bf16").ok
    far.logits += 0.1 * torch.randn(far.logits.shape, generator=torch.Generator().manual_seed(1))
    assert not judge(far, dtype="bf16").ok


def _flip(gap):
    """At every tenth position a runner-up `gap` below the best logit in the reference, and 2e-3 above it in Megatron.

    Elsewhere the logits of both differ by noise of 1e-3 and no choice is near.
    """
    generator = torch.Generator().manual_seed(2)
    hf = Outcome(3 * torch.randn(2, 100, 501, generator=generator), 2.5)
    best = hf.logits.max(-1)
    runner_up = (best.indices + 1) % hf.logits.shape[-1]
    hf.logits.scatter_(-1, best.indices[..., None], best.values[..., None] + 1)
    megatron = Outcome(hf.logits + 1e-3 * torch.randn(hf.logits.shape, generator=generator), 2.5)
    for row in range(2):
        for column in range(0, 100, 10):
            top = hf.logits[row, column].max()
            hf.logits[row, column, runner_up[row, column]] = top - gap
            megatron.logits[row, column, runner_up[row, column]] = megatron.logits[row, column].max() + 2e-3
    return hf, megatron


def test_bf16_excuses_a_near_tie_and_no_genuine_flip():
    hf, megatron = _flip(2e-3)
    result = judge(megatron, hf, dtype="bf16")
    assert result.ok and result.next_token_agreement == pytest.approx(0.9)
    hf, megatron = _flip(0.1)
    result = judge(megatron, hf, dtype="bf16")
    assert result.cosine > 0.9999 and not result.ok
    assert ["next tokens" in finding for finding in result.findings] == [True]


def test_fp32_excuses_exact_ties_only():
    expected = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0 - 1e-6, 0.0]]]).double()
    got = torch.tensor([[[0.9, 1.0, 0.0], [0.9, 1.0, 0.0]]]).double()
    assert near_tie_agreement(expected, got, FP32.tie) == 0.5
    assert near_tie_agreement(expected, torch.full_like(got, math.nan), BF16.tie) == 0


def test_differences_are_relative_to_each_tensor():
    reference = {"large": torch.tensor([100.0, 1.0]), "small": torch.tensor([1e-6, 0.0]), "zero": torch.zeros(2)}
    other = {"large": torch.tensor([100.0, 2.0]), "small": torch.tensor([1e-6, 1e-8]), "zero": torch.zeros(2)}
    differences = compare_tensors(reference, other)
    assert differences["large"] == pytest.approx(0.01)
    assert differences["small"] == pytest.approx(0.01)
    assert differences["zero"] == 0
    assert compare_tensors({"zero": torch.zeros(2)}, {"zero": torch.tensor([0, 1e-12])})["zero"] == math.inf


def test_logits_of_another_shape_are_an_error():
    other = outcome()
    other.logits = other.logits[..., :-1]
    with pytest.raises(ValueError, match="logits are"):
        judge(other)
