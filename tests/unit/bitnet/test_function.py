"""The autograd function on one rank; several are in tests/parallel/test_bitnet.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_bridge.bitnet import function
from falcon_bridge.bitnet.backends import ReferenceBackend
from falcon_bridge.bitnet.codes import WeightCodes
from falcon_bridge.bitnet.function import ternary_linear
from falcon_bridge.bitnet.reference import bitlinear, quantize_weight_segmented
from tests.unit.bitnet.linears import column, holding
from tests.unit.bitnet.weights import draw, fused


BACKEND = ReferenceBackend()


def weight_of(kind="qkv", dtype=torch.float32, in_features=37):
    W, segments, number = fused(kind, in_features, dtype=dtype)
    codes, scales = quantize_weight_segmented(W, segments, number)
    return (
        torch.nn.Parameter(W),
        WeightCodes(codes, scales[segments]),
        {"row_segments": segments, "num_segments": number},
    )


@pytest.mark.parametrize("leading", [(), (1,), (5,), (3, 4), (2, 1, 3), (0,), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_equals_the_reference(leading, dtype, strided):
    W, codes, segments = weight_of(dtype=dtype)
    x, dy = draw(*leading, 37, seed=3, std=2.0, dtype=dtype), draw(*leading, len(W), seed=4, dtype=dtype)
    if strided:
        x, dy = (torch.stack([tensor, tensor + 1], dim=-1)[..., 0] for tensor in (x, dy))
    x.requires_grad_()
    expected = bitlinear(x, W, **segments)
    y = ternary_linear(x, W, codes, BACKEND)
    assert torch.equal(y, expected) and y.dtype == dtype
    gradients = torch.autograd.grad(y, [x, W], dy)
    for actual, exact in zip(gradients, torch.autograd.grad(expected, [x, W], dy), strict=True):
        assert torch.equal(actual, exact) and actual.dtype == dtype


def test_the_output_may_be_written_into():
    """As residual sums do; autograd would refuse it of a view that comes out of a function."""
    W, codes, segments = weight_of()
    x = draw(3, 4, 37).requires_grad_()
    y = ternary_linear(x, W, codes, BACKEND)
    y.mul_(2.0)
    expected = bitlinear(x, W, **segments) * 2.0
    dy = draw(3, 4, len(W), seed=4)
    for actual, exact in zip(
        torch.autograd.grad(y, [x, W], dy), torch.autograd.grad(expected, [x, W], dy), strict=True
    ):
        assert torch.equal(actual, exact)


def test_a_transposed_input():
    W, codes, segments = weight_of()
    x = draw(37, 4, 3).permute(2, 1, 0)
    assert torch.equal(ternary_linear(x, W, codes, BACKEND), bitlinear(x, W, **segments))


@pytest.mark.parametrize("needs_grad", [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_saved(needs_grad):
    W, codes, _ = weight_of()
    x = draw(5, 3, 37)
    x.requires_grad_(needs_grad[0]), W.requires_grad_(needs_grad[1])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = ternary_linear(x, W, codes, BACKEND)
    of_weight = [tensor for tensor in saved if tensor.shape == W.shape]
    of_tokens = [tensor for tensor in saved if tensor.shape == (15, 37)]
    assert [tensor.data_ptr() for tensor in of_weight] == [codes.codes.data_ptr()] * needs_grad[0]
    assert [tensor.dtype for tensor in of_tokens] == [torch.int8] * needs_grad[1]
    others = [tensor for tensor in saved if not any(tensor is one for one in of_weight + of_tokens)]
    assert all(tensor.numel() <= max(len(W), 15) for tensor in others)
    assert y.requires_grad == any(needs_grad)
    if any(needs_grad):
        y.sum().backward()
    assert (x.grad is not None, W.grad is not None) == needs_grad


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_micro_batches_add_up_in_main_grad(main_dtype):
    W, codes, segments = weight_of(dtype=torch.bfloat16)
    W.main_grad, W.grad_added_to_main_grad = torch.zeros(W.shape, dtype=main_dtype), False
    expected = torch.zeros(W.shape, dtype=main_dtype)
    for seed in range(2):
        x, dy = draw(6, 37, seed=seed, dtype=torch.bfloat16), draw(6, len(W), seed=seed + 5, dtype=torch.bfloat16)
        ternary_linear(x, W, codes, BACKEND, accumulate=True).backward(dy)
        latent = W.detach().float().requires_grad_()
        bitlinear(x, latent, **segments).backward(dy)
        expected.add_(latent.grad)
        assert W.grad_added_to_main_grad and W.grad is not None and W.grad.shape == W.shape
    assert torch.equal(W.main_grad, expected)


def test_main_grad_without_megatrons_flag_leaves_no_gradient():
    W, codes, _ = weight_of()
    W.main_grad = torch.zeros(W.shape)
    ternary_linear(draw(6, 37), W, codes, BACKEND, accumulate=True).sum().backward()
    assert W.grad is None and W.main_grad.any()


def test_zeros_where_megatron_asks_for_them():
    W, codes, _ = weight_of()
    W.main_grad, W.grad_added_to_main_grad, W.zero_out_wgrad = torch.zeros(W.shape), False, True
    ternary_linear(draw(6, 37), W, codes, BACKEND, accumulate=True).sum().backward()
    assert W.main_grad.any() and not W.grad.any()


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_gradient_is_returned_where_nothing_accumulates(accumulate):
    W, codes, segments = weight_of()
    if not accumulate:
        W.main_grad, W.grad_added_to_main_grad = torch.zeros(W.shape), False
    x = draw(6, 37)
    ternary_linear(x, W, codes, BACKEND, accumulate=accumulate).sum().backward()
    latent = W.detach().clone().requires_grad_()
    bitlinear(x, latent, **segments).sum().backward()
    assert torch.equal(W.grad, latent.grad)
    assert accumulate or not (W.grad_added_to_main_grad or W.main_grad.any())


class NoSynchronisation(TorchDispatchMode):
    """Fails where a value is fetched, which on a GPU makes the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert "_local_scalar_dense" not in name and "nonzero" not in name and "is_nonzero" not in name, name
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(one_rank, monkeypatch):
    W, segments, _ = fused("gate_up", 48)
    linear = holding(column(len(W), 48, one_rank, matrices="gate_up"), W)
    # it looks at the map on the CPU only
    monkeypatch.setattr("falcon_bridge.bitnet.scales.check_weight", lambda *args: None)
    x, dy = draw(2, 3, 48).requires_grad_(), draw(2, 3, len(W))
    with NoSynchronisation():
        y, _ = linear(x)
        y.backward(dy)
    assert torch.equal(y, bitlinear(x, W, row_segments=segments, num_segments=2))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSynchronisation():
        x.sum().item()


def test_transformer_engines_placeholder_is_taken_where_it_is_installed(monkeypatch):
    asked = []

    def get_dummy_wgrad(shape, dtype, zero=False):
        asked.append((shape, dtype, zero))
        return torch.ones(shape, dtype=dtype)

    monkeypatch.setattr(function.layers, "HAVE_TE", True)
    monkeypatch.setattr(function.layers, "get_dummy_wgrad", get_dummy_wgrad, raising=False)
    W, codes, _ = weight_of()
    W.main_grad, W.grad_added_to_main_grad = torch.zeros(W.shape), False
    ternary_linear(draw(6, 37), W, codes, BACKEND, accumulate=True).sum().backward()
    assert asked == [(list(W.shape), W.dtype, False)] and W.grad.eq(1).all()
