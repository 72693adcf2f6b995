import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_bridge.bitnet import reference
from falcon_bridge.bitnet.reference import (
    FP32_EXACT_IN_FEATURES,
    bitlinear,
    quantize_activation,
    quantize_weight,
    quantize_weight_segmented,
    weight_scale,
)
from falcon_bridge.bitnet.scales import token_absmax
from tests.unit.bitnet.weights import draw, fused, uneven


def activations(*shape, seed=7, dtype=torch.float32):
    """Tokens whose magnitudes span five decades."""
    x = draw(*shape, seed=seed)
    if len(shape) > 1:
        x = x * 10 ** draw(*shape[:-1], 1, seed=seed + 1).clamp(-2.5, 2.5)
    return x.to(dtype)


def explicit(x, W, dy, row_segments=None, num_segments=1):
    """y, dx and dW by the formula, in fp64 from W's and x's values, matrix by matrix and token by token."""
    row_segments = torch.zeros(len(W), dtype=torch.int64) if row_segments is None else row_segments
    tokens, grads = x.detach().reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).double()
    W_quantized = torch.empty(W.shape, dtype=torch.float64)
    for segment in range(num_segments):
        rows = row_segments == segment
        part = W.detach()[rows].float()
        s = (1 / part.double().abs().mean().float().clamp(min=1e-5)).float()
        W_quantized[rows] = torch.floor(part * s + 0.5).clamp(-1, 1).double() / s.double()
    x_quantized = []
    for token in tokens.float():
        a = 127 / token.abs().max().clamp(min=1e-5)
        x_quantized.append(torch.floor(token * a + 0.5).clamp(-128, 127).double() / a.double())
    x_quantized = torch.stack(x_quantized)
    y = x_quantized @ W_quantized.T
    dx = grads @ W_quantized
    dW = grads.T @ x_quantized
    return y.view(dy.shape), dx.view(x.shape), dW


def assert_near(actual, expected, dtype, *, scale=None):
    """Within the rounding of dtype, of each value or, where sums cancel, of `scale`."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    unit = torch.finfo(dtype).eps
    bound = unit * expected.abs() + 2e-6 * (expected.abs().max() if scale is None else scale)
    assert ((actual.double() - expected).abs() <= bound).all()


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    leading=st.sampled_from([(), (1,), (5,), (3, 4), (2, 1, 3)]),
    in_features=st.sampled_from([1, 3, 37, 101, 128]),
    kind=st.sampled_from(["single", "qkv", "gate_up"]),
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    W_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    strided=st.booleans(),
)
def test_values_and_gradients_follow_the_formula(leading, in_features, kind, x_dtype, W_dtype, strided):
    if kind == "single":
        W, row_segments, num_segments = uneven(29, in_features, dtype=W_dtype), None, 1
    else:
        W, row_segments, num_segments = fused(kind, in_features, dtype=W_dtype)
    x = activations(*leading, in_features, dtype=x_dtype)
    dy = draw(*leading, W.shape[0], seed=11, dtype=x_dtype)
    if strided:
        x = torch.stack([x, x + 1], dim=-1)[..., 0]
        W = W.T.contiguous().T
        dy = torch.stack([dy, dy + 1], dim=-1)[..., 0]
    x.requires_grad_(), W.requires_grad_()
    y = bitlinear(x, W, row_segments=row_segments, num_segments=num_segments)
    y.backward(dy)
    expected_y, expected_dx, expected_dW = explicit(x, W, dy, row_segments, num_segments)
    token_scale = expected_y.abs().amax(-1, keepdim=True)
    assert_near(y.detach(), expected_y, x_dtype, scale=token_scale)
    assert_near(x.grad, expected_dx, x_dtype)
    assert_near(W.grad, expected_dW, W_dtype)


def test_the_product_of_codes_is_exact_and_rounded_once():
    x, W = activations(6, 1001), uneven(17, 1001)
    codes, a = quantize_activation(x)
    W_codes, s = quantize_weight(W)
    integers = codes.long() @ W_codes.long().T
    assert torch.equal(bitlinear(x, W), integers.float() / (a * s))
    x, W = x.bfloat16(), W.bfloat16()
    codes, a = quantize_activation(x)
    W_codes, s = quantize_weight(W)
    integers = codes.long() @ W_codes.long().T
    assert torch.equal(bitlinear(x, W), (integers.float() / (a * s)).bfloat16())


def test_the_product_of_codes_is_exact_beyond_what_fp32_holds(monkeypatch):
    in_features = 32 * FP32_EXACT_IN_FEATURES + 3  # too long also for the parts that threads add up
    x = torch.randint(100, 128, (8, in_features), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127  # so that a = 1 and the codes are x
    W = torch.ones(1, in_features)
    exact = x.long().sum(-1, keepdim=True)
    assert (exact > 2**24).all()
    assert torch.equal(bitlinear(x, W), exact.float())
    monkeypatch.setattr(reference, "FP32_EXACT_IN_FEATURES", in_features)
    assert not torch.equal(bitlinear(x, W), exact.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_fp32_whatever_the_input(dtype):
    W, x = uneven(8, 40, dtype=dtype), activations(3, 40, dtype=dtype)
    codes, s = quantize_weight(W)
    q, a = quantize_activation(x)
    assert s.dtype == a.dtype == torch.float32 and s.shape == () and a.shape == (3, 1)
    assert codes.dtype == q.dtype == torch.int8
    assert s == weight_scale(W) == (1 / W.double().abs().mean().float())
    assert torch.equal(a, 127 / x.float().abs().amax(-1, keepdim=True))


def test_a_bf16_tensor_has_the_codes_of_its_fp32_copy():
    W, x = uneven(64, 96, dtype=torch.bfloat16), activations(64, 96, dtype=torch.bfloat16)
    for tensors in (
        zip(quantize_weight(W), quantize_weight(W.float()), strict=True),
        zip(quantize_activation(x), quantize_activation(x.float()), strict=True),
    ):
        assert all(torch.equal(low, high) for low, high in tensors)
    bf16_scale = 127 / x.abs().amax(-1, keepdim=True)
    assert (torch.floor(x * bf16_scale + 0.5) != quantize_activation(x)[0]).double().mean() > 0.01


def test_ties_round_up():
    W = torch.tensor([[0.5, -0.5, 1.5, -1.5]])
    codes, s = quantize_weight(W)
    assert s == 1 and codes.tolist() == [[1, 0, 1, -1]]
    x = torch.tensor([127, 0.5, 1.5, 2.5, 126.5, -0.5, -1.5, -2.5, -126.5, -127])
    codes, a = quantize_activation(x)
    assert a == 1 and codes.tolist() == [127, 1, 2, 3, 127, 0, -1, -2, -126, -127]


def test_each_matrix_of_a_fused_weight_is_quantised_alone():
    W, row_segments, num_segments = fused("qkv", 45)
    codes, scales = quantize_weight_segmented(W, row_segments, num_segments)
    for segment in range(num_segments):
        alone, scale = quantize_weight(W[row_segments == segment])
        assert torch.equal(codes[row_segments == segment], alone) and scales[segment] == scale


def test_cached_codes_give_the_same_result_and_are_shared():
    W, row_segments, num_segments = fused("gate_up", 24)
    W.requires_grad_()
    x = activations(2, 3, 24).requires_grad_()
    codes, scales = quantize_weight_segmented(W, row_segments, num_segments)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = bitlinear(x, W, weight_codes=codes, scales=scales, row_segments=row_segments, num_segments=num_segments)
    dy = draw(*y.shape)
    cached = torch.autograd.grad(y, [x, W], dy)
    other = bitlinear(x, W, row_segments=row_segments, num_segments=num_segments)
    assert torch.equal(y, other)
    for actual, expected in zip(cached, torch.autograd.grad(other, [x, W], dy), strict=True):
        assert torch.equal(actual, expected)

    assert next(tensor for tensor in saved if tensor.shape == W.shape).data_ptr() == codes.data_ptr()
    large = [tensor for tensor in saved if tensor.numel() > max(W.shape[0], x.numel() // x.shape[-1])]
    assert sorted(tuple(tensor.shape) for tensor in large) == sorted([tuple(W.shape), tuple(x.shape)])
    assert all(tensor.dtype == torch.int8 for tensor in large)


@pytest.mark.parametrize("needs_grad", [(True, False), (False, True), (False, False)])
def test_only_what_a_gradient_needs_is_saved(needs_grad):
    x, W = activations(5, 24), uneven(16, 24)
    x.requires_grad_(needs_grad[0]), W.requires_grad_(needs_grad[1])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = bitlinear(x, W)
    assert any(tensor.shape == W.shape for tensor in saved) == needs_grad[0]
    assert any(tensor.shape == x.shape for tensor in saved) == needs_grad[1]
    assert y.requires_grad == any(needs_grad)
    if any(needs_grad):
        y.sum().backward()
        assert (x.grad is not None, W.grad is not None) == needs_grad


def test_parts_of_the_input_features_add_up():
    W, x = uneven(12, 40), activations(7, 40)
    x = x * (1 + 3 * (torch.arange(40) >= 20))
    whole = bitlinear(x, W)
    absmax, scale = token_absmax(x), weight_scale(W).reshape(1)
    parts = sum(
        bitlinear(x_part, W_part, scales=scale, absmax=absmax)
        for x_part, W_part in zip(x.chunk(2, -1), W.chunk(2, -1), strict=True)
    )
    assert ((parts - whole).abs() <= 1e-6 * whole.abs().amax(-1, keepdim=True)).all()
    apart = sum(bitlinear(x_part, W_part) for x_part, W_part in zip(x.chunk(2, -1), W.chunk(2, -1), strict=True))
    assert (apart - whole).abs().max() > 1e-2 * whole.abs().max()


def test_zeros_give_zeros():
    x, W = activations(4, 20), uneven(9, 20)
    x[2] = 0
    W[3] = 0
    y = bitlinear(x, W)
    assert (y[2] == 0).all() and (y[:, 3] == 0).all() and (y[[0, 1, 3]] != 0).any(-1).all()
    zero_W = torch.zeros(9, 20, requires_grad=True)
    x.requires_grad_()
    y = bitlinear(x, zero_W)
    y.backward(draw(4, 9))
    assert (y == 0).all() and (x.grad == 0).all() and zero_W.grad.isfinite().all() and (zero_W.grad != 0).any()
    fused_W = torch.cat([torch.zeros(3, 20), draw(3, 20)])
    y = bitlinear(x, fused_W, row_segments=torch.tensor([0, 0, 0, 1, 1, 1]), num_segments=2)
    assert (y[:, :3] == 0).all() and (y[[0, 1, 3], 3:] != 0).any()


def test_no_tokens_give_no_rows():
    x = torch.empty(0, 3, 20, requires_grad=True)
    W = uneven(9, 20).requires_grad_()
    y = bitlinear(x, W)
    y.sum().backward()
    assert y.shape == (0, 3, 9) and x.grad.shape == x.shape and (W.grad == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_activation_reaches_its_token_and_the_weight_gradient(bad, dtype):
    x, W = activations(4, 20, dtype=dtype), uneven(9, 20, dtype=dtype).requires_grad_()
    x[1, 7] = bad
    y = bitlinear(x, W)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    y.backward(draw(4, 9, dtype=dtype))
    assert W.grad.isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("supplied", [False, True])
def test_a_bad_weight_reaches_its_matrix_and_the_input_gradient(bad, supplied):
    W, row_segments, num_segments = fused("gate_up", 20)
    _, scales = quantize_weight_segmented(W, row_segments, num_segments)
    W[(row_segments == 1).nonzero()[2], 7] = bad
    x = activations(4, 20).requires_grad_()
    y = bitlinear(x, W, scales=scales if supplied else None, row_segments=row_segments, num_segments=num_segments)
    assert y[:, row_segments == 1].isnan().all() and y[:, row_segments == 0].isfinite().all()
    y.sum().backward()
    assert x.grad.isnan().all()


def test_a_bad_gradient_is_not_clipped():
    x, W = activations(4, 20).requires_grad_(), uneven(9, 20).requires_grad_()
    dy = draw(4, 9)
    dy[2, 3] = float("nan")
    bitlinear(x, W).backward(dy)
    assert x.grad.isnan().any(-1).tolist() == [False, False, True, False]
    assert W.grad.isnan().any(-1).nonzero().tolist() == [[3]]


def test_the_largest_finite_values_stay_finite():
    x = torch.tensor([[torch.finfo(torch.float32).max, 1.0]])
    codes, a = quantize_activation(x)
    assert codes.tolist() == [[127, 0]] and a.isfinite().all() and (a > 0).all()


def test_autocast_changes_nothing():
    x, W, dy = activations(5, 501).requires_grad_(), uneven(16, 501).requires_grad_(), draw(5, 16)
    plain = bitlinear(x, W)
    expected = torch.autograd.grad(plain, [x, W], dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bitlinear(x, W)
        actual = torch.autograd.grad(y, [x, W], dy)
    assert torch.equal(y, plain)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_inputs_are_left_as_they_are():
    x, W = activations(5, 24), uneven(16, 24)
    x_before, W_before = x.clone(), W.clone()
    bitlinear(x.requires_grad_(), W.requires_grad_()).sum().backward()
    assert torch.equal(x, x_before) and torch.equal(W, W_before)


X, W = torch.ones(2, 4), torch.ones(3, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": torch.ones(2, 5)}, r"x must be \[..., in\] for W \[out, in\], got x \[2, 5\]"),
        ({"x": torch.tensor(1.0)}, r"got x \[\]"),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, "x must be a floating-point tensor"),
        ({"x": torch.ones(2, 0), "W": torch.ones(3, 0)}, "k > 0"),
        ({"W": torch.ones(4)}, "W must be a floating-point matrix"),
        ({"weight_codes": torch.ones(3, 4)}, "weight_codes must be int8"),
        ({"weight_codes": torch.ones(4, 3, dtype=torch.int8)}, r"weight_codes must be int8 \[3, 4\]"),
        ({"weight_codes": torch.ones(3, 4, dtype=torch.int8)}, "weight_codes needs scales"),
        ({"scales": torch.ones(())}, r"scales must be float32 \[1\]"),
        ({"scales": torch.ones(1, dtype=torch.bfloat16)}, "got torch.bfloat16"),
        ({"scales": torch.ones(3), "num_segments": 3}, "needs row_segments"),
        (
            {"weight_codes": torch.ones(3, 4, dtype=torch.int8), "scales": torch.ones(3), "num_segments": 3},
            "needs row_segments",
        ),
        ({"row_segments": torch.tensor([0, 1, 2]), "num_segments": 2}, "ids from 0 to 2"),
        ({"absmax": torch.ones(2)}, r"absmax must be float32 \[2, 1\]"),
        ({"absmax": torch.ones(2, 1, dtype=torch.float64)}, "got torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        bitlinear(**({"x": X, "W": W} | arguments))
    assert "\n" not in str(error.value)
