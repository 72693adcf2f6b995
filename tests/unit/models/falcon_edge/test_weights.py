"""Latent weights from each form of a checkpoint and back: codes bit for bit, scales exactly, nothing guessed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_bridge.bitnet.reference import quantize_weight
from falcon_bridge.conversion.bitnet_config import LATENT_ENTRY, PACKED_ENTRY
from falcon_bridge.models.falcon_edge.packing import latent_weight, pack_ternary
from falcon_bridge.models.falcon_edge.weights import Form, checkpoint_form, from_latent, nonfinite_latents, to_latent
from tests.unit.bitnet.weights import draw, uneven


Q, K, NORM = (f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "input_layernorm"))
MEAN_ENTRY = PACKED_ENTRY | {"linear_class": "autobitlinear"}


def stored(form, tensors):
    return dict(from_latent(form, tensors.items()))


def form_of(tensors, entry=None):
    return checkpoint_form(entry, tensors, tensors.__getitem__)


def latents(form, tensors, entry, dtype=torch.float32, name=K):
    return to_latent(form, name, tensors[name], scale=tensors.get(name + "_scale"), entry=entry, dtype=dtype)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(out=st.integers(1, 40), width=st.integers(1, 40), std=st.floats(1e-3, 50), seed=st.integers(0, 99))
def test_fp32_latents_have_trainings_scale_exactly(out, width, std, seed):
    """Any scale that training can have, not only those of weights with a single magnitude."""
    codes, scale = quantize_weight(draw(out, width, seed=seed, std=std))
    latent = latent_weight(codes, 1 / scale.item())
    again, same = quantize_weight(latent)
    assert torch.equal(again, codes)
    few = codes.count_nonzero() < 4  # whose magnitudes leave the mean too little choice
    assert same == scale or not codes.any() or (few and abs(same / scale - 1) <= 2**-22)


@pytest.mark.parametrize("std", [0.013, 0.7, 31.0])
def test_bf16_latents_of_a_real_matrix_have_trainings_scale_exactly(std):
    codes, scale = quantize_weight(draw(512, 512, seed=4, std=std))
    latent = latent_weight(codes, 1 / scale.item(), torch.bfloat16)
    assert latent.dtype == torch.bfloat16 and latent.abs().unique().numel() <= 3
    again, same = quantize_weight(latent)
    assert torch.equal(again, codes) and same == scale


def test_a_mean_below_trainings_floor_is_refused():
    codes, _ = quantize_weight(uneven(8, 12))
    with pytest.raises(ValueError, match=r"^w: mean\|W\| 5e-06 is below 1e-05"):
        latent_weight(codes, 5e-6, name="w")
    latent_weight(codes, 1e-5)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", Form)
def test_every_form_comes_back(form, source):
    tensors = {K: uneven(16, 24, dtype=source), Q: uneven(32, 24, seed=1, dtype=source), NORM: draw(24, dtype=source)}
    entry = {Form.PACKED: PACKED_ENTRY, Form.LATENT: LATENT_ENTRY}.get(form)
    written = stored(form, tensors)
    assert torch.equal(written[NORM], tensors[NORM])
    assert form_of(written, entry) == form
    for name in (K, Q):
        latent = latents(form, written, entry, name=name)
        for ours, expected in zip(quantize_weight(latent), quantize_weight(tensors[name]), strict=True):
            assert torch.equal(ours, expected)
    again = stored(form, {name: latents(form, written, entry, name=name) for name in (K, Q)})
    assert all(torch.equal(again[name], written[name]) for name in again)


def test_packed_is_trainings_codes_and_scale():
    W = uneven(16, 24)
    codes, scale = quantize_weight(W)
    written = stored(Form.PACKED, {K: W})
    assert torch.equal(written[K], pack_ternary(codes))
    assert written[K + "_scale"].dtype == torch.float32 and torch.equal(written[K + "_scale"], scale.reshape(1))


def test_dequantised_is_codes_over_scale():
    W = uneven(16, 24)
    codes, scale = quantize_weight(W)
    assert torch.equal(stored(Form.DEQUANTIZED, {K: W})[K], codes / scale)


def test_the_config_tells_the_scales_convention():
    """The same bytes with 1/mean and with mean: latent weights that differ by the square of the mean."""
    W = uneven(16, 24)
    written = stored(Form.PACKED, {K: W})
    _, scale = quantize_weight(W)
    by_mean = {K: written[K], K + "_scale": 1 / written[K + "_scale"]}
    _, found = quantize_weight(latents(Form.PACKED, by_mean, MEAN_ENTRY))
    assert found.item() == pytest.approx(scale.item(), rel=2**-22)
    _, wrong = quantize_weight(latents(Form.PACKED, by_mean, PACKED_ENTRY))
    assert wrong.item() == pytest.approx(1 / scale.item(), rel=1e-5)
    for entry, message in ((None, "no quantization_config"), (LATENT_ENTRY, "quantization_mode is 'online'")):
        with pytest.raises(ValueError, match=f"^{K}_scale: .*{message}"):
            latents(Form.PACKED, written, entry)


def test_latents_of_one_magnitude_are_latents_only_where_the_config_says_so():
    """An export of untrained latents of a packed checkpoint: read as dequantised, its scale would grow."""
    codes, scale = quantize_weight(uneven(16, 24))
    tensors = {K: latent_weight(codes, 1 / scale.item())}
    assert form_of(tensors, LATENT_ENTRY) == Form.LATENT
    dequantised = {K: codes / scale}
    assert form_of(dequantised) == form_of(dequantised, PACKED_ENTRY) == Form.DEQUANTIZED


def test_forms_that_mix_are_refused():
    W = uneven(16, 24)
    with pytest.raises(ValueError, match=f"^{Q}: has more than one magnitude, .* ambiguous: .*autobitlinear"):
        latents(Form.DEQUANTIZED, {Q: W}, None, name=Q)
    codes, scale = quantize_weight(W)
    dequantised = {Q: codes / scale}
    with pytest.raises(ValueError, match=f"^{Q}: has a single magnitude .* more than one, .* ambiguous: .*autobit"):
        latents(Form.LATENT, dequantised, None, name=Q)
    assert torch.equal(latents(Form.LATENT, dequantised, LATENT_ENTRY, name=Q), dequantised[Q])
    assert not latents(Form.LATENT, {Q: torch.zeros(8, 4)}, None, name=Q).any()
    with pytest.raises(ValueError, match=f"^{Q}: packed ternary weights are uint8, got torch.float32"):
        latents(Form.PACKED, {Q: W}, PACKED_ENTRY, name=Q)
    with pytest.raises(ValueError, match=f"^{Q}: torch.uint8 among floating-point weights"):
        latents(Form.LATENT, stored(Form.PACKED, {Q: W}), None, name=Q)
    with pytest.raises(ValueError, match="no projection among the checkpoint's tensors"):
        form_of({NORM: W})


@pytest.mark.parametrize("form", [Form.PACKED, Form.DEQUANTIZED])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_without_codes_are_refused(form, value):
    W = uneven(16, 24)
    W[3, 5] = value
    with pytest.raises(ValueError, match=f"^{K}: has NaN or infinite weights"):
        stored(form, {K: W})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nonfinite_weights_are_no_latents_unless_allowed(value):
    W = uneven(16, 24)
    W[3, 5] = value
    message = f"^{Q}: has NaN or infinite weights, .* fetch it again, or take an earlier checkpoint"
    for form, entry in [(Form.LATENT, None), (Form.LATENT, LATENT_ENTRY), (Form.DEQUANTIZED, None)]:
        with pytest.raises(ValueError, match=message):
            latents(form, {Q: W}, entry, name=Q)
    with nonfinite_latents():
        assert latents(Form.LATENT, {Q: W}, None, name=Q) is W
        # from which no code can be read
        with pytest.raises(ValueError, match=message), nonfinite_latents():
            latents(Form.DEQUANTIZED, {Q: W}, None, name=Q)
    with nonfinite_latents(), pytest.raises(ValueError, match=message), nonfinite_latents(False):
        latents(Form.LATENT, {Q: W}, None, name=Q)
    with pytest.raises(ValueError, match=message):
        latents(Form.LATENT, {Q: W}, None, name=Q)


def test_a_matrix_that_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match=rf"^{K}: 18 out features are not a multiple of 4"):
        stored(Form.PACKED, {K: uneven(18, 8)})
