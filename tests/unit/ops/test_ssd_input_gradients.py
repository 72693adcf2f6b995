"""The kernel of the gradients within a chunk in Triton's interpreter, fp32 on the CPU, against dense formulas."""

import pytest
import torch

from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter
from tests.unit.ops.ssd_terms import make_inputs, terms


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=11)


@pytest.fixture(scope="module")
def kernels():
    from falcon_bridge.ops.ssd.kernels import input_gradients

    return input_gradients


def gradients(kernels, inputs, found, config, splits=None):
    """What the kernel gives by the names of `terms`, parts and splits summed up; dx is written into wider rows."""
    batch, length, heads, head_dim = inputs.x.shape
    row = torch.full((length, batch, heads * head_dim + 8), 7.0, dtype=inputs.x.dtype)
    dx = row.transpose(0, 1)[..., : heads * head_dim].unflatten(2, (heads, head_dim))
    dscores, ddt, pair, key, dd = kernels.input_gradients(
        inputs.dy, inputs.x, inputs.b, inputs.c, found["dt"].float(), found["log2_decay"].float(),
        found["dstates"].to(inputs.x.dtype), inputs.d, inputs.seq_idx, dx, config=config,
    )  # fmt: skip
    assert (row[..., heads * head_dim :] == 7).all()
    assert all(t.dtype == torch.float32 for t in (dscores, ddt, pair, key, dd))
    assert dd.shape[1:] == (batch, ddt.shape[2], heads)
    assert (dscores.triu(1) == 0).all() and (splits is None or len(dscores) == splits)
    return {"dx": dx, "dscores": dscores.sum(0), "ddt": ddt, "pair": pair.sum(0), "key": key, "dd": dd.sum((0, 1, 2))}


def assert_close(got, found, tolerance):
    for name, value in got.items():
        want = found[name]
        assert value.shape == want.shape, name
        error, largest = (value - want).abs().max(), want.abs().max()
        assert error <= tolerance * largest, f"{name}: {error:.1e} of {largest:.1e}"


@interpreted
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ({}, {"block": 32}),
        ({}, {"block": 16, "heads": 1}),
        ({"groups": 2, "documents": True}, {"block": 16, "heads": 2}),
        ({"heads": 6, "groups": 2, "documents": True}, {"block": 32, "heads": 2}),  # programs of 2 and 1 heads
        ({"heads": 3, "documents": True, "head_dim": 32, "d_state": 16}, {"block": 16, "heads": 2}),
        ({"length": 21}, {"block": 16}),  # shorter than a chunk
        ({"length": 13}, {"block": 16}),  # shorter than a block of keys
        ({"length": 140, "chunk": 64, "heads": 2, "documents": True}, {"block": 16}),  # four blocks a chunk
        ({"batch": 1, "length": 128, "chunk": 64, "heads": 2, "head_dim": 64, "d_state": 128}, {"block": 32}),
    ],
)
def test_gradients(kernels, shape, config):
    inputs = make_inputs(**shape)
    found = terms(inputs)
    assert_close(gradients(kernels, inputs, found, config), found, 2e-5)


@interpreted
def test_half_precision_operands(kernels):
    inputs = make_inputs(documents=True, dtype=torch.float16)
    found = terms(inputs)
    assert_close(gradients(kernels, inputs, found, {"block": 16}), found, 1e-3)


@interpreted
def test_heads_are_shared_out_until_there_are_enough_programs(kernels, monkeypatch):
    inputs = make_inputs(heads=10, groups=2, head_dim=16, d_state=16)
    found = terms(inputs)
    for programs, splits in ((1, 1), (12, 1), (20, 2), (512, 2)):  # 2 rows of 3 chunks of 2 groups of 5 heads
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        monkeypatch.setattr(kernels, "_FEWEST_HEADS", 1)
        assert_close(gradients(kernels, inputs, found, None, splits=splits), found, 2e-5)


@interpreted
def test_a_block_that_does_not_divide_the_chunk(kernels):
    inputs = make_inputs(batch=1, length=16, heads=1, chunk=16)
    with pytest.raises(ValueError, match="a chunk of 16 tokens does not divide into blocks of 32 keys"):
        gradients(kernels, inputs, terms(inputs), {"block": 32})
