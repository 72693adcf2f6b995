"""The scan by our Triton kernels on a GPU: bf16 and fp32 against the fp64 oracle, beside mamba-ssm's kernels."""

import pytest
import torch

from tests.unit.ops.ssd_terms import Inputs, make_inputs, terms


pytestmark = pytest.mark.gpu

SHAPES = {
    "90M": {"heads": 8, "head_dim": 32, "d_state": 64},
    "0.5B": {"heads": 6, "head_dim": 64, "d_state": 128},
    "1.5B": {"heads": 12, "head_dim": 64, "d_state": 256},
    "34B": {"heads": 4, "head_dim": 128, "d_state": 256, "groups": 2},
    "small": {"heads": 4, "head_dim": 16, "d_state": 16, "groups": 2},
}
SUMS = ("da", "ddt_bias", "dd")


def run(inputs: Inputs, backend: str) -> dict[str, torch.Tensor]:
    """Result and gradients of the scan, by name."""
    from falcon_bridge.ops.ssd import mamba_scan
    from falcon_bridge.ops.ssd.kernels import scan

    kernels = scan if backend == "triton" else mamba_scan
    steps = inputs.raw_dt, inputs.dt_scale, inputs.dt_bias, inputs.a, inputs.d, inputs.seq_idx, inputs.chunk
    found = {"y": kernels.scan_forward(inputs.x, inputs.b, inputs.c, *steps)}
    like = {"dx": inputs.x, "db": inputs.b, "dc": inputs.c, "draw_dt": inputs.raw_dt}
    written = {name: torch.full_like(one, torch.nan) for name, one in like.items()}
    sums = kernels.scan_backward(inputs.dy, found["y"], inputs.x, inputs.b, inputs.c, *steps, **written)
    return found | written | dict(zip(("da", "ddt_bias", "dd"), sums, strict=True))


def errors(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: ((found[name].double() - want[name]).norm() / want[name].norm()).item() for name in found}


def drawn(size: str, **options) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """Inputs on the GPU, and what is expected of them."""
    inputs = make_inputs(**SHAPES[size], **options)
    return inputs.cuda(), {name: value.cuda() for name, value in terms(inputs).items()}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("size", SHAPES)
def test_bf16_against_fp64(size, documents, report):
    """Results are rounded to 8 bits, 2e-3 on average; so are operands and states on the way.

    Sums over all tokens are of terms that cancel.
    """
    inputs, want = drawn(size, length=700, chunk=128, documents=documents, dtype=torch.bfloat16)
    found = errors(run(inputs, "triton"), want)
    worst = max(found, key=found.get)
    report(test="ssd bf16", size=size, documents=documents, worst=worst, error=found[worst])
    assert all(error <= (2e-2 if name in SUMS else 4e-3) for name, error in found.items()), found


def beside_mamba_ssm(size: str, documents: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Errors in bf16, ours and mamba-ssm's."""
    inputs, want = drawn(size, length=700, chunk=128, documents=documents, dtype=torch.bfloat16)
    return errors(run(inputs, "triton"), want), errors(run(inputs, "mamba_ssm"), want)


@pytest.mark.parametrize(("size", "documents"), [("0.5B", True), ("1.5B", False)])
def test_bf16_is_as_close_to_fp64_as_mamba_ssm(size, documents, rank, report):
    ours, theirs = rank(beside_mamba_ssm, size, documents)
    worst = max(ours, key=lambda name: ours[name] / max(theirs[name], 2e-3))
    report(test="ssd bf16", size=size, documents=documents, worst=worst, ours=ours[worst], mamba_ssm=theirs[worst])
    assert all(ours[name] <= 1.3 * max(theirs[name], 2e-3) for name in ours), (ours, theirs)


def exact(size: str, documents: bool) -> dict[str, float]:
    """Errors in fp32; in a process where fp32 products are not done in TF32."""
    inputs, want = drawn(size, length=300, chunk=64, documents=documents)
    return errors(run(inputs, "triton"), want)


@pytest.mark.parametrize("size", ["0.5B", "34B", "small"])
def test_fp32(size, fp32_rank, report):
    found = fp32_rank(exact, size, True)
    worst = max(found, key=found.get)
    report(test="ssd fp32", size=size, worst=worst, error=found[worst])
    assert found[worst] <= 1e-5, found


def test_runs_are_the_same_bits():
    inputs, _ = drawn("0.5B", length=700, chunk=128, documents=True, dtype=torch.bfloat16)
    first, second = run(inputs, "triton"), run(inputs, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
