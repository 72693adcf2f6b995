"""BitNet linears on GPU, by backend, against the reference; a ternary Falcon-H1 among Transformer Engine layers."""

import pytest
import torch

from falcon_bridge.bitnet import reference
from falcon_bridge.bitnet.codes import invalidate
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.parity import compare
from falcon_bridge.verification.reference import TrainSteps
from falcon_bridge.verification.roundtrip import mismatched_tensors
from tests.gpu.rank import checkpoint
from tests.unit.bitnet.weights import draw, fused


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

BACKENDS = ("reference", "onebitllms", "fused")


def backend_of(name):
    from falcon_bridge.bitnet.backends import choose_backend

    if name == "onebitllms":
        pytest.importorskip("onebitllms")
    return choose_backend(name, "cuda")


def linear_of(name, W, kind, dtype, *, accumulate=False):
    from tests.unit.bitnet.linears import column, holding

    backend_of(name)
    fields = {"params_dtype": dtype, "gradient_accumulation_fusion": accumulate}
    linear = holding(column(*W.shape, torch.distributed.group.WORLD, matrices=kind, fields=fields), W).cuda()
    linear.config.bitnet_backend = name
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 4), (130, 100, 129), (257, 1000, 513), (70_000, 64, 48)], ids=str)
def test_codes_of_onebitllms(shape, dtype):
    m, k, n = shape
    x, W = draw(m, k, std=3.0, dtype=dtype).cuda(), draw(n, k, seed=1, dtype=dtype).cuda()
    W[n // 2 :] *= 7
    x[-1] = 0
    segments = (torch.arange(n, device="cuda") >= n // 2).long()
    expected, scales = reference.quantize_weight_segmented(W, segments, 2)
    backend = backend_of("onebitllms")
    assert torch.equal(backend.quantize_weight(W, scales[segments]), expected)
    codes, scale = backend.quantize_activation(x)
    expected, expected_scale = reference.quantize_activation(x)
    differing = (codes.int() - expected.int()).abs()
    assert torch.equal(scale, expected_scale) and differing.max() <= 1
    # bf16 values lie on the border between two codes more often
    most = 1e-3 if dtype == torch.bfloat16 else 1e-4
    assert differing.double().mean() <= most
    part, part_scale = backend.quantize_activation(x[:, : k // 2], x.abs().amax(1, keepdim=True).float())
    assert torch.equal(part_scale, expected_scale)
    assert (part.int() - expected[:, : k // 2].int()).abs().double().mean() <= most


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["qkv", "gate_up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_equals_the_reference(name, kind, dtype):
    W, segments, number = fused(kind, 96, dtype=dtype)
    linear = linear_of(name, W, kind, dtype)
    x, dy = draw(5, 2, 96, seed=2, std=3.0, dtype=dtype).cuda(), draw(5, 2, len(W), seed=3, dtype=dtype).cuda()
    x.requires_grad_()
    y, _ = linear(x)
    y.backward(dy)
    latent = W.cuda().requires_grad_()
    other = x.detach().clone().requires_grad_()
    expected = reference.bitlinear(other, latent, row_segments=segments.cuda(), num_segments=number)
    expected.backward(dy)
    if name != "onebitllms":
        assert torch.equal(y, expected)
    # gradients in bf16 are products of operands that were rounded to it; so is the output of onebitllms
    limit = 1e-2 if dtype == torch.bfloat16 else 5e-3
    for actual, exact in ((y, expected), (x.grad, other.grad), (linear.weight.grad, latent.grad)):
        assert actual.dtype == exact.dtype
        assert (actual.float() - exact.float()).norm() <= limit * exact.float().norm()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_micro_batches_add_up_in_main_grad(name, main_dtype):
    W, segments, number = fused("qkv", 96, dtype=torch.bfloat16)
    linear = linear_of(name, W, "qkv", torch.bfloat16, accumulate=True)
    linear.weight.main_grad = torch.zeros(W.shape, dtype=main_dtype, device="cuda")
    linear.weight.grad_added_to_main_grad = False
    latent = W.cuda().float().requires_grad_()
    for seed in range(3):
        x = draw(40, 96, seed=seed, dtype=torch.bfloat16).cuda()
        dy = draw(40, len(W), seed=seed + 9, dtype=torch.bfloat16).cuda()
        linear(x)[0].backward(dy)
        reference.bitlinear(x, latent, row_segments=segments.cuda(), num_segments=number).backward(dy)
    assert linear.weight.grad_added_to_main_grad
    error = (linear.weight.main_grad.float() - latent.grad).norm() / latent.grad.norm()
    assert error <= 1e-2


@pytest.mark.parametrize("name", BACKENDS)
def test_the_host_never_waits(name):
    """Not in a step either whose weights are new; after the first, which moves the map of the rows over."""
    W, _, _ = fused("qkv", 96, dtype=torch.bfloat16)
    linear = linear_of(name, W, "qkv", torch.bfloat16)
    x, dy = draw(40, 96, dtype=torch.bfloat16).cuda().requires_grad_(), draw(40, len(W), dtype=torch.bfloat16).cuda()
    linear(x)[0].backward(dy)  # also compiles kernels
    invalidate()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear(x)[0].backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_show(name, bad):
    W, segments, _ = fused("gate_up", 96, dtype=torch.bfloat16)
    linear = linear_of(name, W, "gate_up", torch.bfloat16)
    x = draw(4, 96, dtype=torch.bfloat16).cuda()
    x[1, 7] = bad
    y, _ = linear(x)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    with torch.no_grad():
        linear.weight[(segments == 1).nonzero()[3].item(), 5] = bad
    up = (segments == 1).cuda()
    y, _ = linear(draw(4, 96, dtype=torch.bfloat16).cuda())
    assert y[:, up].isnan().all() and y[:, ~up].isfinite().all()


def fused_against_reference(path):
    from transformers import AutoConfig

    from falcon_bridge.verification.megatron import MegatronUnderTest, megatron_outcome
    from tests.parallel.variant import Variant

    batch = random_batch(AutoConfig.from_pretrained(path), batch_size=2, seq_length=150, seed=3)
    outcomes = []
    for backend in ("reference", "fused"):
        model = MegatronUnderTest(path, Variant(fields={"use_bitnet": True, "bitnet_backend": backend}))
        kinds = {type(module).__name__ for module in model.chunks[0].modules()}
        try:
            compared, mismatched = mismatched_tensors(path, model.export())
            outcomes.append(megatron_outcome(model, batch, gradients=True, train=TrainSteps(steps=3)))
        finally:
            model.close()
    about = {"params_compared": compared, "mismatched": mismatched, "layout": {}, "dtype": "fp32", "seconds": 0.0}
    return compare(*outcomes, **about), kinds


def test_a_ternary_falcon_h1_among_transformer_engines_layers(tmp_path, fp32_rank, report):
    """Activations are equal bit for bit, layer after layer, so that no code between two layers differs either.

    The reference backend is compared with transformers on the CPU (tests/parallel/test_bitnet.py): on a GPU
    transformers has out_proj inside of a fused kernel, where it stays dense.
    """
    result, kinds = fp32_rank(fused_against_reference, checkpoint(tmp_path, "groups2_gated_norm"))
    report(
        test="ternary parity fp32",
        max_rel_logit_diff=result.max_abs_logit_diff / result.max_abs_logit,
        max_rel_grad_diff=result.max_rel_grad_diff,
    )
    assert {"TEDotProductAttention", "BitNetColumnParallelLinear", "BitNetRowParallelLinear"} <= kinds
    assert not any(kind.startswith("TE") and kind.endswith("Linear") for kind in kinds)
    assert result.max_abs_logit_diff == 0
    assert not result.findings
