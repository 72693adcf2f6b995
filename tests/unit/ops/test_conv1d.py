import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_bridge.ops import conv1d
from falcon_bridge.ops.conv1d import causal_conv1d, causal_conv1d_final_state


def naive_conv1d(x, weight, bias=None, *, activation="silu", seq_idx=None, initial_state=None):
    """Token by token, tap by tap: walks back until the document ends."""
    b, length, d = x.shape
    k = weight.shape[1]
    rows = []
    for i in range(b):
        for t in range(length):
            total = torch.zeros(d, dtype=torch.float64) if bias is None else bias
            for back in range(k):
                s = t - back
                if seq_idx is not None and 0 <= s < t and seq_idx[i, s] != seq_idx[i, s + 1]:
                    break
                if s < 0 and seq_idx is not None and any(seq_idx[i, u] != seq_idx[i, u + 1] for u in range(t)):
                    break
                if s >= 0:
                    total = total + weight[:, k - 1 - back] * x[i, s]
                elif initial_state is not None:
                    total = total + weight[:, k - 1 - back] * initial_state[i, k - 1 + s]
            rows.append(total)
    y = torch.stack(rows).view(b, length, d)
    return y * torch.sigmoid(y) if activation == "silu" else y


def make_inputs(b=2, length=23, d=5, k=4, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (b, length, d), "weight": (d, k), "bias": (d,), "initial_state": (b, k - 1, d)}
    return {
        name: (torch.randn(*shape, generator=generator, dtype=torch.float64) * (i + 1)).to(dtype).requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
    }


def run(function, inputs, **options):
    y = function(**inputs, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    leaves = {name: tensor for name, tensor in inputs.items() if tensor is not None and tensor.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    return {"y": y} | {
        f"d{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def assert_close(actual, expected, tolerance=1e-12):
    for name, reference in expected.items():
        difference = (actual[name] - reference).abs().max() if reference.numel() else 0
        assert difference <= tolerance * max(reference.abs().max() if reference.numel() else 0, 1), name


def packed(b, length, probability=0.25, seed=0):
    starts = torch.rand(b, length, generator=torch.Generator().manual_seed(seed)) < probability
    return 3 - starts.int().cumsum(1) % 2


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    b=st.integers(1, 2),
    length=st.integers(1, 14),
    k=st.integers(1, 5),
    activation=st.sampled_from(["silu", None]),
    absent=st.sets(st.sampled_from(["bias", "initial_state"])),
    is_packed=st.booleans(),
    block=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_match_the_loop(b, length, k, activation, absent, is_packed, block, seed):
    inputs = make_inputs(b, length, 3, k, seed=seed) | dict.fromkeys(absent)
    options = {"activation": activation, "seq_idx": packed(b, length, seed=seed) if is_packed else None}
    whole = conv1d._BLOCK_ELEMENTS
    conv1d._BLOCK_ELEMENTS = block
    try:
        actual = run(causal_conv1d, inputs, **options)
    finally:
        conv1d._BLOCK_ELEMENTS = whole
    assert_close(actual, run(naive_conv1d, inputs, **options))


def test_equals_the_convolution_of_torch():
    inputs = make_inputs(d=8)
    inputs["initial_state"] = None

    def by_torch(x, weight, bias, initial_state):
        y = torch.nn.functional.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[2])
        return torch.nn.functional.silu(y[..., : x.shape[1]].mT)

    assert_close(run(causal_conv1d, inputs), run(by_torch, inputs))


def test_gradcheck():
    inputs = make_inputs(1, 6, 2, 3)
    seq_idx = packed(1, 6)

    def function(x, weight, bias, initial_state):
        return causal_conv1d(x, weight, bias, seq_idx=seq_idx, initial_state=initial_state)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("cut", [1, 2, 3, 11, 22])
@pytest.mark.parametrize("is_packed", [False, True])
def test_two_calls_with_the_state_passed_on_equal_one(cut, is_packed):
    inputs = make_inputs()
    seq_idx = packed(2, 23, 0.4) if is_packed else None
    whole = causal_conv1d(**inputs, seq_idx=seq_idx)
    x, state = inputs["x"], inputs["initial_state"]
    ids = (None, None) if seq_idx is None else (seq_idx[:, :cut], seq_idx[:, cut:])
    first = causal_conv1d(**inputs | {"x": x[:, :cut]}, seq_idx=ids[0])
    state = causal_conv1d_final_state(x[:, :cut], 4, state, seq_idx=ids[0])
    if is_packed:
        state = state * (seq_idx[:, cut] == seq_idx[:, cut - 1])[:, None, None]
    second = causal_conv1d(**inputs | {"x": x[:, cut:], "initial_state": state}, seq_idx=ids[1])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_final_state_is_the_last_inputs(length):
    inputs = make_inputs(length=length)
    x, before = inputs["x"], inputs["initial_state"]
    assert torch.equal(causal_conv1d_final_state(x, 4, before), torch.cat([before, x], 1)[:, length:])
    assert torch.equal(causal_conv1d_final_state(x, 4), torch.cat([torch.zeros_like(before), x], 1)[:, length:])
    assert causal_conv1d_final_state(x, 1, seq_idx=packed(2, length)).shape == (2, 0, 5)


def test_only_the_input_is_kept_for_the_backward():
    inputs = make_inputs(1, 64, 32, dtype=torch.float32) | {"initial_state": None}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        causal_conv1d(**inputs)
    assert sum(kept) == sum(tensor.nbytes for tensor in inputs.values() if tensor is not None)


def test_bf16_accumulates_in_float32_and_strides_do_not_matter():
    half = make_inputs(length=70, d=6, dtype=torch.bfloat16)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in half.items()}
    half["x"] = half["x"].detach().mT.contiguous().mT.requires_grad_()
    actual, expected = run(causal_conv1d, half), run(naive_conv1d, exact)
    for name, reference in expected.items():
        assert actual[name].dtype == torch.bfloat16
        error = (actual[name].double() - reference).abs().max() / reference.abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps, f"{name}: {error}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 23)}, r"x must be \[b, l, d\]"),
        ({"weight": torch.randn(5, 1, 4)}, r"weight must be \[d, k\]"),
        ({"weight": torch.randn(4, 4)}, "weight must be"),
        ({"bias": torch.randn(1)}, "bias must be"),
        ({"initial_state": torch.randn(2, 4, 5)}, "initial_state must be"),
        ({"seq_idx": torch.zeros(2, 22, dtype=torch.int32)}, "seq_idx must be"),
        ({"activation": "gelu"}, 'activation must be "silu" or None'),
        ({"x": torch.ones(2, 23, 5, dtype=torch.int64)}, "x must be a floating-point tensor"),
    ],
)
def test_misfitting_inputs_get_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        causal_conv1d(**make_inputs() | change)
    assert "\n" not in str(error.value)
