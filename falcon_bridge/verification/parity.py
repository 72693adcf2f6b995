"""Comparison of two models' outcomes on one batch, and the verdict."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from falcon_bridge.verification.reference import Outcome


@dataclass(frozen=True)
class Tolerances:
    """How far apart two implementations may be.

    Attributes:
        logits: max |Δlogit| over max |logit|; None where rounding forbids it (bf16).
        loss: |Δloss| in nats; None likewise.
        gradients: per tensor, max |Δg| over max |g|; None likewise.
        weights: per tensor after the train steps, max |Δw| over max |w|; None likewise.
        cosine: least cosine between the two logit tensors.
        agreement: least share of positions whose most likely next token is the same, near-ties counted as the same.
        tie: a position is a near-tie where the reference prefers its own token to the other model's by at most this
            many times the rounding noise, the root mean square of Δlogit over the whole batch. (Not the largest Δlogit
            of that position: no flip can exceed twice that, so nothing would ever disagree.) The difference of two
            independently rounded logits has √2 times that noise, and 4.25 is three standard deviations. Noise large
            enough to excuse a fault fails `cosine`. 0 excuses exact ties only.
    """

    logits: float | None
    loss: float | None
    gradients: float | None
    weights: float | None
    cosine: float
    agreement: float
    tie: float = 0.0


FP32 = Tolerances(logits=1e-5, loss=2e-6, gradients=1e-4, weights=1e-4, cosine=0.999999, agreement=0.99)
BF16 = Tolerances(logits=None, loss=None, gradients=None, weights=None, cosine=0.9999, agreement=0.99, tie=4.25)
# activations next to the middle between two int8 codes may get either, in the steps (fp32) and in bf16 everywhere; of
# the rest docs/bitnet.md says why it is as exact as a dense model's
FP32_TERNARY = replace(FP32, weights=2e-2)
BF16_TERNARY = replace(BF16, cosine=0.999)


def tolerances_for(dtype: str, ternary: bool) -> Tolerances:
    """Those of a dense or a ternary (BitNet) model in ``"fp32"`` or ``"bf16"``."""
    return {"fp32": (FP32, FP32_TERNARY), "bf16": (BF16, BF16_TERNARY)}[dtype][ternary]


@dataclass
class ParityResult:
    """The verdict; the fields up to `seconds` are the keys of ``verify --json``.

    Attributes:
        ok: every figure is within its tolerance and no parameter is mismatched.
        params_compared: Hugging Face tensors whose round trip through Megatron was compared.
        params_mismatched: how many of them came back changed in any bit, or missing, or uncalled for.
        max_abs_logit_diff: over all positions and the true vocabulary.
        max_abs_logit: of transformers.
        cosine: between the two logit tensors, flattened, in fp64.
        next_token_agreement: share of positions with the same argmax; the verdict also accepts near-ties, see
            `Tolerances.tie`.
        loss_hf: mean over tokens, in nats.
        loss_megatron: the same.
        max_rel_grad_diff: worst tensor's max |Δg| / max |g|; None without a train step.
        max_rel_weight_diff: the same of the weights after the train steps; None without.
        layout: the parallel layout.
        dtype: ``"fp32"`` or ``"bf16"``.
        seconds: wall time.
        findings: one readable line for each figure out of tolerance.
        grad_diffs: `max_rel_grad_diff` by tensor.
    """

    ok: bool
    params_compared: int
    params_mismatched: int
    max_abs_logit_diff: float
    max_abs_logit: float
    cosine: float
    next_token_agreement: float
    loss_hf: float
    loss_megatron: float
    max_rel_grad_diff: float | None
    max_rel_weight_diff: float | None
    layout: dict[str, Any]
    dtype: str
    seconds: float
    findings: list[str] = field(default_factory=list)
    grad_diffs: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The contract's keys; `max_rel_grad_diff` and `max_rel_weight_diff` only with a train step."""
        values = asdict(self)
        del values["findings"], values["grad_diffs"]
        return {k: v for k, v in values.items() if v is not None}


def compare_tensors(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """For each tensor, max |Δ| over max |reference|; infinite where it is missing, misshapen or not finite.

    A reference that is zero throughout must be equalled exactly.
    """
    differences = {}
    for name, expected in reference.items():
        got = other.get(name)
        if got is None or got.shape != expected.shape:
            differences[name] = float("inf")
            continue
        difference = (got.double() - expected.double()).abs().max().item()
        scale = expected.double().abs().max().item()
        ratio = difference / scale if scale else (0.0 if difference == 0 else float("inf"))
        differences[name] = ratio if ratio == ratio else float("inf")
    return differences


def near_tie_agreement(expected: torch.Tensor, got: torch.Tensor, tie: float) -> float:
    """Share of positions at which the two models choose the same token, or differ by a near-tie of the reference.

    Args:
        expected: the reference's logits, ``[b, s, v]``.
        got: the other model's, ``[b, s, v]``.
        tie: see `Tolerances`.
    """
    preferred = expected.max(-1).values
    margin = preferred - expected.gather(-1, got.argmax(-1, keepdim=True)).squeeze(-1)
    noise = (got - expected).square().mean().sqrt()
    # a NaN anywhere is no near-tie
    return (margin <= tie * noise).double().mean().item()


def compare(
    hf: Outcome,
    megatron: Outcome,
    *,
    params_compared: int,
    mismatched: list[str],
    layout: dict[str, Any],
    dtype: str,
    seconds: float,
    tolerances: Tolerances | None = None,
) -> ParityResult:
    """Judge `megatron` against `hf`.

    Args:
        hf: transformers' outcome.
        megatron: Megatron's outcome on the same batch.
        params_compared: tensors compared after the round trip.
        mismatched: names of those that differ.
        layout: as in `ParityResult`.
        dtype: ``"fp32"`` or ``"bf16"``.
        seconds: wall time to report.
        tolerances: None takes `FP32` or `BF16` by `dtype`.
    """
    tolerances = tolerances or {"fp32": FP32, "bf16": BF16}[dtype]
    expected, got = hf.logits.double(), megatron.logits.double()
    if expected.shape != got.shape:
        raise ValueError(f"logits are {list(got.shape)} in Megatron and {list(expected.shape)} in transformers")
    max_abs_logit = expected.abs().max().item()
    max_diff = (got - expected).abs().max().item()
    cosine = torch.nn.functional.cosine_similarity(expected.flatten(), got.flatten(), dim=0).item()
    agreement = (expected.argmax(-1) == got.argmax(-1)).double().mean().item()
    grad_diffs = compare_tensors(hf.gradients, megatron.gradients)
    weight_diffs = compare_tensors(hf.weights, megatron.weights)
    findings = [f"{name} does not come back from Megatron bit for bit" for name in mismatched]
    if not params_compared:
        findings.append("no parameter was compared")

    def check(name: str, value: float, limit: float | None) -> None:
        if limit is not None and not value <= limit:  # a NaN is a finding
            findings.append(f"{name} is {value:.3g}, the limit is {limit:.3g}")

    check("max |Δlogit| / max |logit|", max_diff / max_abs_logit if max_abs_logit else max_diff, tolerances.logits)
    check("|Δloss|", abs(hf.loss - megatron.loss), tolerances.loss)
    check("1 - cosine of the logits", 1 - cosine, 1 - tolerances.cosine)
    settled = near_tie_agreement(expected, got, tolerances.tie)
    check("share of differing next tokens (near-ties aside)", 1 - settled, 1 - tolerances.agreement)
    for name, value in grad_diffs.items():
        check(f"relative gradient difference of {name}", value, tolerances.gradients)
    for name, value in weight_diffs.items():
        check(f"relative difference of {name} after the train steps", value, tolerances.weights)
    return ParityResult(
        ok=not findings,
        params_compared=params_compared,
        params_mismatched=len(mismatched),
        max_abs_logit_diff=max_diff,
        max_abs_logit=max_abs_logit,
        cosine=cosine,
        next_token_agreement=agreement,
        loss_hf=hf.loss,
        loss_megatron=megatron.loss,
        max_rel_grad_diff=max(grad_diffs.values()) if grad_diffs else None,
        max_rel_weight_diff=max(weight_diffs.values()) if weight_diffs else None,
        layout=layout,
        dtype=dtype,
        seconds=seconds,
        findings=findings,
        grad_diffs=grad_diffs,
    )
