import logging

import pytest
import torch

from falcon_bridge.bitnet import reference
from falcon_bridge.bitnet.backends import (
    CHOICES,
    ReferenceBackend,
    check_choice,
    choose_backend,
    quantize_weight_by_mean,
)
from falcon_bridge.bitnet.scales import token_absmax
from tests.unit.bitnet.weights import draw, fused, uneven


@pytest.mark.parametrize("kind", ["single", "qkv", "gate_up"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("W_dtype", [torch.float32, torch.bfloat16])
def test_the_reference_in_parts_is_the_reference(kind, x_dtype, W_dtype):
    W, segments, number = (
        (uneven(30, 37, dtype=W_dtype), None, 1) if kind == "single" else fused(kind, 37, dtype=W_dtype)
    )
    x, dy = draw(11, 37, seed=1, std=3.0, dtype=x_dtype), draw(11, len(W), seed=2, dtype=x_dtype)
    whole_x, whole_W = x.clone().requires_grad_(), W.clone().requires_grad_()
    y = reference.bitlinear(whole_x, whole_W, row_segments=segments, num_segments=number)
    y.backward(dy)

    backend = ReferenceBackend()
    expected_codes, scales = reference.quantize_weight_segmented(W, segments, number)
    row_scales = scales if segments is None else scales[segments]
    weight_codes = backend.quantize_weight(W, row_scales)
    codes, scale = backend.quantize_activation(x)
    assert torch.equal(weight_codes, expected_codes) and weight_codes.is_contiguous()
    assert torch.equal(backend.forward(codes, scale, weight_codes, row_scales, x_dtype), y)
    assert torch.equal(backend.grad_input(dy, weight_codes, row_scales, x_dtype), whole_x.grad)
    assert torch.equal(backend.grad_weight(dy, codes, scale, W_dtype), whole_W.grad)


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_added_to_what_is_there(main_dtype):
    backend, (x, dy) = ReferenceBackend(), (draw(11, 37, dtype=torch.bfloat16), draw(11, 5, dtype=torch.bfloat16))
    codes, scale = backend.quantize_activation(x)
    before = draw(5, 37, seed=3, dtype=main_dtype)
    main_grad = before.clone()
    assert backend.grad_weight(dy, codes, scale, torch.bfloat16, main_grad) is None
    expected = before + backend.grad_weight(dy, codes, scale, torch.float32)
    assert torch.equal(main_grad, expected.to(main_dtype))


def test_a_part_of_a_row_is_scaled_by_the_whole_row():
    x = draw(6, 40) * (1 + 5 * (torch.arange(40) < 13))
    whole, scale = ReferenceBackend().quantize_activation(x)
    codes, part_scale = ReferenceBackend().quantize_activation(x[:, 13:], token_absmax(x))
    assert torch.equal(codes, whole[:, 13:]) and torch.equal(part_scale, scale)


@pytest.mark.parametrize("kind", ["single", "qkv", "gate_up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_by_its_means(kind, dtype):
    W, segments, number = uneven(30, 37, dtype=dtype), None, 1
    if kind != "single":
        W, segments, number = fused(kind, 37, dtype=dtype)
    rows = torch.zeros(len(W), dtype=torch.int64) if segments is None else segments
    counts = rows.bincount(minlength=number).double() * 37
    codes, row_scales = quantize_weight_by_mean(ReferenceBackend(), W, counts, segments)
    expected, scales = reference.quantize_weight_segmented(W, segments, number)
    assert torch.equal(codes, expected) and torch.equal(row_scales, scales if segments is None else scales[segments])


def test_a_backends_own_way_to_quantise_a_weight_is_taken():
    class Own(ReferenceBackend):
        def quantize_weight_by_mean(self, *arguments):
            return arguments

    arguments = draw(4, 3), torch.ones(2), torch.tensor([0, 1, 1, 0]), object()
    assert quantize_weight_by_mean(Own(), *arguments) == arguments


def test_auto_is_the_reference_on_a_cpu_and_the_choice_is_logged_once(caplog):
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="falcon_bridge.bitnet.backends"):
        chosen = [choose_backend("auto", "cpu") for _ in range(3)]
    assert all(backend is chosen[0] for backend in chosen) and chosen[0].name == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "BitNet linears on cpu: backend 'reference' (bitnet_backend='auto')"
    ]


@pytest.mark.parametrize("choice", ["fused", "onebitllms"])
def test_gpu_backends_are_refused_on_a_cpu(choice):
    with pytest.raises(ValueError, match=f"bitnet_backend='{choice}' needs a GPU .*: use 'auto' or 'reference'$"):
        choose_backend(choice, "cpu")


def test_an_unknown_choice_is_refused_with_the_closest_one():
    with pytest.raises(ValueError, match=r"bitnet_backend='fusd' is not one of .*: did you mean 'fused'\?$") as error:
        check_choice("fusd")
    assert all(repr(choice) in str(error.value) for choice in CHOICES)
