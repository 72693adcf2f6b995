"""The kernels of step sizes and decays in Triton's interpreter, on the CPU, against the dense formulas in fp64."""

import pytest
import torch

from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter
from tests.unit.ops.ssd_terms import make_inputs, terms


CASES = [
    {},
    {"heads": 11, "head_dim": 16, "groups": 1, "documents": True},  # a block of heads that is not full
    {"heads": 6, "groups": 2, "length": 33, "chunk": 16, "head_dim": 32, "d_state": 16, "documents": True},
    {"heads": 3, "length": 9, "batch": 3},  # shorter than a chunk
    {"heads": 2, "length": 128, "chunk": 64, "batch": 1, "head_dim": 64, "d_state": 128},  # nothing behind the end
]


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=15)


@pytest.fixture(scope="module")
def kernels():
    from falcon_bridge.ops.ssd.kernels import decay

    return decay


def assert_close(got, want, bound=2e-5):
    """The largest error is below `bound` of the largest element."""
    assert got.shape == want.shape
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= bound, float(error)


def split(tensor, parts, seed):
    """`[parts, ...]` of one size, in fp32, whose sum is the tensor."""
    shares = torch.randn(parts, *tensor.shape, generator=torch.Generator().manual_seed(seed)).double()
    shares[-1] = tensor - shares[:-1].sum(0)
    return shares.float()


def dirty(tensor, length):
    """An fp32 copy with NaN behind the row's end of `[..., chunks, chunk]`."""
    copy = tensor.float()
    copy.flatten(-2)[..., length:] = torch.nan
    return copy


def gradient_inputs(inputs, found):
    """The tensors that `step_gradients` takes of other kernels, in its order, several parts of some."""
    length = inputs.raw_dt.shape[1]
    ddt, key = (dirty(found[name], length) for name in ("ddt", "key"))
    pair = dirty(split(found["pair"], 2, seed=1), length)
    query = dirty(split(found["query"], 3, seed=2), length)
    products = (inputs.x.double() * inputs.dy.double()).sum(-1)
    whole = torch.nn.functional.pad(products, (0, 0, 0, -length % inputs.chunk))
    dd = split(whole.unflatten(1, (-1, inputs.chunk)).sum(2), 2, seed=4)
    return ddt, pair, key, query, split(found["decay_grad"], 2, seed=3), dd, found["dt"].float()


def gradients(kernels, inputs, found, draw_dt, **options):
    steps = (inputs.raw_dt, inputs.dt_scale, inputs.dt_bias, inputs.a)
    return kernels.step_gradients(*gradient_inputs(inputs, found), *steps, draw_dt, **options)


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_steps_and_decays(kernels, case):
    inputs = make_inputs(**case)
    found = terms(inputs)
    dt, log2_decay = kernels.step_decay(inputs.raw_dt, inputs.dt_scale, inputs.dt_bias, inputs.a, inputs.chunk)
    assert_close(dt, found["dt"], 1e-6)
    assert_close(log2_decay, found["log2_decay"], 1e-6)
    assert (dt.flatten(2)[..., inputs.x.shape[1] :] == 0).all()


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_gradients(kernels, case):
    inputs = make_inputs(**case)
    found = terms(inputs)
    batch, length, heads = inputs.raw_dt.shape
    rows = torch.full((length, batch, heads + 5), 7.0)
    da, ddt_bias, dd = gradients(kernels, inputs, found, rows[..., 2 : 2 + heads].transpose(0, 1))
    assert_close(rows[..., 2 : 2 + heads].transpose(0, 1), found["draw_dt"])
    assert (rows[..., :2] == 7).all() and (rows[..., 2 + heads :] == 7).all()
    assert_close(da, found["da"])
    assert_close(ddt_bias, found["ddt_bias"])
    assert_close(dd, found["dd"])


@interpreted
def test_any_strides(kernels):
    inputs = make_inputs(heads=5)
    found = terms(inputs)
    options = {"config": {"heads": 2, "num_warps": 1}}
    rows = torch.full((5, 75, 2, 2), 7.0)
    rows[..., 0] = inputs.raw_dt.permute(2, 1, 0)
    inputs.raw_dt = rows[..., 0].permute(2, 1, 0)
    steps = (inputs.raw_dt, inputs.dt_scale, inputs.dt_bias, inputs.a, inputs.chunk)
    for got, name in zip(kernels.step_decay(*steps, **options), ("dt", "log2_decay"), strict=True):
        assert_close(got, found[name], 1e-6)
    draw_dt = torch.full((5, 2, 75, 3), 7.0)
    gradients(kernels, inputs, found, draw_dt[..., 1].permute(1, 2, 0), **options)
    assert_close(draw_dt[..., 1].permute(1, 2, 0), found["draw_dt"])
    assert (draw_dt[..., ::2] == 7).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kernels, dtype):
    inputs = make_inputs(groups=2, dtype=dtype)
    found = terms(inputs)
    steps = (inputs.raw_dt, inputs.dt_scale, inputs.dt_bias, inputs.a, inputs.chunk)
    for got, name in zip(kernels.step_decay(*steps), ("dt", "log2_decay"), strict=True):
        assert got.dtype == torch.float32
        assert_close(got, found[name], 1e-6)
    draw_dt = torch.empty_like(inputs.raw_dt)
    da, ddt_bias, _ = gradients(kernels, inputs, found, draw_dt)
    assert_close(draw_dt, found["draw_dt"], torch.finfo(dtype).eps)
    assert_close(da, found["da"])
    assert_close(ddt_bias, found["ddt_bias"])


@interpreted
def test_softplus_from_vanishing_to_linear(kernels):
    raw = torch.linspace(-80, 80, 1601).view(1, -1, 1)
    dt, _ = kernels.step_decay(raw, 1.0, torch.zeros(1), -torch.ones(1), 128)
    want = torch.nn.functional.softplus(raw.double(), threshold=100).flatten()
    torch.testing.assert_close(dt.flatten()[: raw.numel()].double(), want, rtol=3e-7, atol=0)


@interpreted
def test_a_large_key_does_not_drown_those_before_it(kernels):
    inputs = make_inputs(batch=1, length=3, heads=1, chunk=16)
    dt = terms(inputs)["dt"]
    key, none = torch.zeros_like(dt), torch.zeros_like(dt)
    key[0, 0, 0, :3] = torch.tensor([0.3, 2.0, 1e9])
    given = [t.float() for t in (none, none[None], key, none[None], none[None, ..., 0], none[..., 0].mT, dt)]
    steps = (inputs.raw_dt, inputs.dt_scale, inputs.dt_bias, inputs.a)
    da, _, _ = kernels.step_gradients(*given, *steps, torch.empty_like(inputs.raw_dt))
    assert_close(da, dt[0, 0, 0, 1:3] @ torch.tensor([0.3, 2.3]).double()[:, None], 1e-6)
