import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from falcon_bridge.ops.ssd import blocks, ssd_chunked, ssd_recurrent


NAMES = ("x", "dt", "A", "B", "C", "D", "initial_states")


def make_inputs(b=2, length=37, h=4, p=5, g=2, n=3, *, seed=0, dtype=torch.float64, log_decay=None):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    inputs = {
        "x": draw(b, length, h, p, std=1.7),
        "dt": torch.nn.functional.softplus(draw(b, length, h, std=2.0) - 1),
        "A": -torch.exp(draw(h)),
        "B": draw(b, length, g, n, std=0.6),
        "C": draw(b, length, g, n, std=2.3),
        "D": draw(h),
        "initial_states": draw(b, h, p, n, std=3.0),
    }
    if log_decay is not None:
        inputs["A"] = log_decay / inputs["dt"].mean((0, 1))
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def documents(lengths, b=2):
    """Ids that fall, rise and come back: only a change may count."""
    ids = torch.cat([torch.full((length,), (5, 0, 3)[i % 3]) for i, length in enumerate(lengths)])
    return torch.stack([ids, ids.flip(0)])[:b]


def run(function, inputs, seed=1, **options):
    """Return y, the final states and the gradients of a random functional of both."""
    y, final = function(**inputs, **options)
    generator = torch.Generator().manual_seed(seed)
    dy, dfinal = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, final))
    leaves = {name: tensor for name, tensor in inputs.items() if tensor is not None and tensor.requires_grad}
    grads = torch.autograd.grad([y, final], list(leaves.values()), [dy, dfinal])
    return {"y": y, "final": final} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        assert actual[name].dtype == reference.dtype and actual[name].shape == reference.shape, name
        difference = (actual[name] - reference).abs().max()
        assert difference <= tolerance * reference.abs().max(), f"{name}: {difference} of {reference.abs().max()}"


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 5, 8, 16, 37])
def test_values_and_gradients_match_the_recurrence(length, groups):
    inputs = make_inputs(length=length, g=groups)
    assert_close(run(ssd_chunked, inputs, chunk_size=8), run(ssd_recurrent, inputs), 1e-10)


@pytest.mark.parametrize("lengths", [[37], [1, 1, 1, 19, 4, 11], [8, 8, 21], [36, 1], [7, 9, 16, 5]])
@pytest.mark.parametrize("block_elements", [1, 1 << 18])
def test_documents_reset_the_state(lengths, block_elements, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block_elements)
    inputs, seq_idx = make_inputs(), documents(lengths)
    assert_close(
        run(ssd_chunked, inputs, chunk_size=8, seq_idx=seq_idx), run(ssd_recurrent, inputs, seq_idx=seq_idx), 1e-10
    )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_matches_the_recurrence(data):
    length = data.draw(st.integers(1, 40), "length")
    heads, groups = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3)]), "heads, groups")
    inputs = make_inputs(
        data.draw(st.integers(1, 3), "b"),
        length,
        heads,
        data.draw(st.integers(1, 6), "p"),
        groups,
        data.draw(st.integers(1, 6), "n"),
        seed=data.draw(st.integers(0, 2**16), "seed"),
    )
    for name in data.draw(st.sets(st.sampled_from(["D", "initial_states"])), "absent"):
        inputs[name] = None
    seq_idx = None
    if data.draw(st.booleans(), "packed"):
        starts = torch.rand(inputs["x"].shape[:2], generator=torch.Generator().manual_seed(length)) < 0.15
        seq_idx = 7 - starts.int().cumsum(1)
    chunk_size = data.draw(st.integers(1, 48), "chunk_size")
    assert_close(
        run(ssd_chunked, inputs, chunk_size=chunk_size, seq_idx=seq_idx),
        run(ssd_recurrent, inputs, seq_idx=seq_idx),
        1e-10,
    )


@pytest.mark.parametrize("lengths", [[1, 20, 16], [8, 29], [12, 12, 13]])
def test_packed_documents_equal_each_alone(lengths):
    inputs = make_inputs(b=1)
    y, final = ssd_chunked(**inputs, chunk_size=8, seq_idx=documents(lengths, b=1))
    start = 0
    for length in lengths:
        rows = {name: inputs[name][:, start : start + length] for name in ("x", "dt", "B", "C")}
        rows |= {name: inputs[name] for name in ("A", "D")}
        state = inputs["initial_states"] if start == 0 else None
        alone, alone_final = ssd_recurrent(**rows, initial_states=state)
        torch.testing.assert_close(y[:, start : start + length], alone, rtol=0, atol=1e-12)
        start += length
    torch.testing.assert_close(final, alone_final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 8, 19, 36])
@pytest.mark.parametrize("packed", [False, True])
def test_two_calls_with_the_state_passed_on_equal_one(cut, packed):
    inputs = make_inputs()
    seq_idx = documents([10, 9, 18]) if packed else None

    def in_two_calls(x, dt, A, B, C, D, initial_states):
        outputs, state = [], initial_states
        for rows in (slice(None, cut), slice(cut, None)):
            ids = None
            if packed:
                ids = seq_idx[:, rows]
                if rows.start:
                    state = state * (ids[:, 0] == seq_idx[:, cut - 1])[:, None, None, None]
            y, state = ssd_chunked(
                x[:, rows], dt[:, rows], A, B[:, rows], C[:, rows], D, chunk_size=8, initial_states=state, seq_idx=ids
            )
            outputs.append(y)
        return torch.cat(outputs, 1), state

    assert_close(run(in_two_calls, inputs), run(ssd_chunked, inputs, chunk_size=8, seq_idx=seq_idx), 1e-10)


@pytest.mark.parametrize("log_decay", [-200.0, -5e4, 0.0])
@pytest.mark.parametrize("packed", [False, True])
def test_extreme_decays(log_decay, packed):
    inputs = make_inputs()
    with torch.no_grad():
        inputs["A"].fill_(-1.0 if log_decay else 0.0)
        if log_decay:
            inputs["dt"].fill_(-log_decay)
    seq_idx = documents([10, 9, 18]) if packed else None
    actual = run(ssd_chunked, inputs, chunk_size=8, seq_idx=seq_idx)
    assert all(tensor.isfinite().all() for tensor in actual.values())
    assert_close(actual, run(ssd_recurrent, inputs, seq_idx=seq_idx), 1e-10)


def test_float32_keeps_its_precision_where_strong_and_weak_decays_meet():
    """In float32, differences of cumulated log-decays near -2e5 would be off by 1e-2."""
    inputs = make_inputs(b=1, length=64, dtype=torch.float64)
    with torch.no_grad():
        inputs["A"].fill_(-1.0)
        inputs["dt"][:, ::2], inputs["dt"][:, 1::2] = 0.013, 0.37
        inputs["dt"][:, 32] = 2e5
    single = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in single.items()}
    actual = {name: tensor.double() for name, tensor in run(ssd_chunked, single, chunk_size=64).items()}
    assert_close(actual, run(ssd_recurrent, exact), 5e-6)


def test_gradcheck():
    inputs = make_inputs(1, 7, 2, 2, 1, 3)
    seq_idx = documents([4, 3], b=1)

    def function(*tensors):
        return ssd_chunked(**dict(zip(NAMES, tensors, strict=True)), chunk_size=3, seq_idx=seq_idx)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    half = make_inputs(length=150, dtype=dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in half.items()}
    actual, expected = run(ssd_chunked, half, chunk_size=16), run(ssd_recurrent, exact)
    assert actual["y"].dtype == dtype and actual["final"].dtype == torch.float32
    # the state never passes through the inputs' dtype
    assert (actual["final"] - expected["final"]).abs().max() <= 1e-5 * expected["final"].abs().max()
    for name, reference in expected.items():
        error = (actual[name].double() - reference).abs().max() / reference.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps, f"{name}: {error}"


def test_autocast_leaves_the_accumulation_alone():
    inputs = make_inputs(dtype=torch.float32)
    expected = run(ssd_chunked, inputs, chunk_size=8)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(ssd_chunked, inputs, chunk_size=8)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("frozen", [*NAMES, "all but A", "all"])
def test_inputs_that_need_no_gradient(frozen):
    inputs = make_inputs(length=11)
    expected = run(ssd_recurrent, inputs)
    for name, tensor in inputs.items():
        tensor.requires_grad_(not (frozen in (name, "all") or (frozen == "all but A" and name != "A")))
    if frozen == "all":
        y, final = ssd_chunked(**inputs, chunk_size=4)
        assert not y.requires_grad and not final.requires_grad
        return
    actual = run(ssd_chunked, inputs, chunk_size=4)
    assert len(actual) < len(expected)
    assert_close(actual, {name: expected[name] for name in actual}, 1e-10)


def test_no_grad_and_a_single_output_used():
    inputs = make_inputs()
    with torch.no_grad():
        y, final = ssd_chunked(**inputs, chunk_size=8)
    assert not y.requires_grad and y.grad_fn is None
    for index, output in enumerate((y, final)):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        grads = [
            torch.autograd.grad((function(**inputs)[index] * weights).sum(), list(inputs.values()), allow_unused=True)
            for function in (ssd_chunked, ssd_recurrent)
        ]
        for name, actual, expected in zip(NAMES, *grads, strict=True):
            expected = torch.zeros_like(actual) if expected is None else expected
            assert (actual - expected).abs().max() <= 1e-10 * max(expected.abs().max(), 1), name


def test_non_contiguous_inputs():
    inputs = make_inputs()
    expected = run(ssd_chunked, inputs, chunk_size=8)
    strided = {
        name: torch.stack([tensor.detach().mT if tensor.dim() > 1 else tensor.detach()] * 2, -1)[..., 1]
        for name, tensor in inputs.items()
    }
    strided = {name: (t.mT if t.dim() > 1 else t).requires_grad_() for name, t in strided.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_close(run(ssd_chunked, strided, chunk_size=8), expected, 1e-14)


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive, at their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return result


def saved_and_peak_bytes(length):
    """Bytes that autograd keeps, and the most that was alive at once in forward and backward."""
    inputs = make_inputs(1, length, 4, 16, 1, 16, dtype=torch.float32)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with PeakMemory() as memory, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, final = ssd_chunked(**inputs)
        torch.autograd.grad([y, final], list(inputs.values()), [torch.ones_like(y), torch.ones_like(final)])
    return sum(saved.values()), memory.peak


def test_memory_is_linear_in_the_length(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", 1)  # else the working set of a block, a constant, hides the slope
    (saved, peak), (saved_double, peak_double) = saved_and_peak_bytes(512), saved_and_peak_bytes(1024)
    assert saved <= sum(t.nbytes for t in make_inputs(1, 512, 4, 16, 1, 16, dtype=torch.float32).values())
    assert 1.9 < saved_double / saved < 2.1
    assert 1.6 < peak_double / peak < 2.1


@pytest.mark.parametrize("function", [ssd_chunked, ssd_recurrent])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.randn(2, 37, 20), r"x must be \[b, l, h, p\]"),
        ("x", torch.randn(2, 0, 4, 5), "no empty dimension"),
        ("B", torch.randn(2, 36, 2, 3), "B must be"),
        ("B", torch.randn(2, 37, 3, 3), "heads .4. must be a multiple of the number of groups .3."),
        ("C", torch.randn(2, 37, 1, 3), "C must be"),
        ("dt", torch.randn(2, 37, 4, 1), "dt must be"),
        ("A", torch.randn(1), "A must be"),
        ("D", torch.randn(4, 5), "D must be"),
        ("D", torch.ones(4, dtype=torch.int64), "D must be a floating-point tensor"),
        ("initial_states", torch.randn(2, 4, 3, 5), "initial_states must be"),
        ("seq_idx", torch.zeros(37, dtype=torch.int32), r"seq_idx must be \[b, l\]"),
        ("seq_idx", torch.zeros(2, 37), "seq_idx must hold integers"),
    ],
)
def test_misfitting_inputs_get_one_clear_line(function, name, value, message):
    with pytest.raises(ValueError, match=message) as error:
        function(**make_inputs() | {name: value})
    assert "\n" not in str(error.value)


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        ssd_chunked(**make_inputs(), chunk_size=0)
