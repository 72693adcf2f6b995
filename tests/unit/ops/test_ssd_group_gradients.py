"""The kernel of B's and C's gradients in Triton's interpreter, on the CPU, against the dense formulas."""

import pytest
import torch

from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter
from tests.unit.ops.ssd_terms import make_inputs, terms


SMALL = {"block_m": 16, "block_n": 16}
CASES = {
    "one group, a last chunk that is not full": ({}, None),
    "two groups, tiles of a part of the chunk and of N": ({"groups": 2, "d_state": 64, "documents": True}, SMALL),
    "a launch a gradient": (
        {"groups": 2, "heads": 6, "documents": True, "length": 96},
        {"one_launch": False, "block_m": 16},
    ),
    "shorter than a chunk": ({"batch": 1, "length": 11, "heads": 3}, SMALL),
    "a chunk of one token": ({"batch": 1, "length": 33, "heads": 1, "seed": 3}, None),
    "the 0.5B model's heads": ({"batch": 1, "head_dim": 64, "d_state": 128, "heads": 2, "length": 70}, None),
    "large chunks": ({"batch": 1, "length": 300, "chunk": 128, "heads": 2, "documents": True}, {"block_m": 64}),
}


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=len(CASES) + 3)


@pytest.fixture(scope="module")
def kernels():
    from falcon_bridge.ops.ssd.kernels import group_gradients

    return group_gradients


def padded(like, tail, dtype):
    """A view shaped as `like` of wider rows whose memory is sequence first, and these rows, all 7."""
    batch, length, groups, d_state = like.shape
    rows = torch.full((length, batch, groups * d_state + tail), 7.0, dtype=dtype)
    return rows.transpose(0, 1)[..., : groups * d_state].unflatten(2, (groups, d_state)), rows


def run(kernels, inputs, want, splits=1, config=None, tails=(8, 16)):
    """query summed over its parts, dB and dC, and the two gradients' rows."""
    dtype = inputs.x.dtype
    shares = torch.tensor([1.0]) if splits == 1 else torch.tensor([0.6, -1.1, 1.5])[:splits]
    dscores = want["dscores"].float() * (shares / shares.sum()).view(-1, 1, 1, 1, 1, 1)
    (db, b_rows), (dc, c_rows) = padded(inputs.b, tails[0], dtype), padded(inputs.c, tails[1], dtype)
    per_token = [want[name].float() for name in ("dt", "log2_decay")]
    states = [want[name].to(dtype) for name in ("states", "dstates")]
    query = kernels.group_gradients(
        inputs.dy, inputs.x, inputs.b, inputs.c, *per_token, *states, dscores, inputs.seq_idx, db, dc, config
    )
    return {"query": query.sum(0), "db": db, "dc": dc}, (b_rows, c_rows), query


def assert_near(got, want, limit):
    for name, value in got.items():
        error, scale = (value.double() - want[name]).abs().max(), want[name].abs().max()
        assert error <= limit * scale, (name, error, scale)  # nothing enters a first chunk: query is exactly 0 there


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_against_the_dense_formulas(kernels, name):
    options, config = CASES[name]
    inputs = make_inputs(**options)
    want = terms(inputs)
    got, rows, _ = run(kernels, inputs, want, splits=3 if options.get("documents") else 1, config=config)
    assert_near(got, want, 2e-6)
    for row, tail in zip(rows, (8, 16), strict=True):
        assert (row[..., -tail:] == 7).all()


@interpreted
def test_strides_that_eight_does_not_divide(kernels):
    inputs = make_inputs(documents=True, seed=5)
    want = terms(inputs)
    assert_near(run(kernels, inputs, want, tails=(3, 5))[0], want, 2e-6)


@interpreted
def test_query_comes_in_parts_and_is_zero_behind_the_end(kernels):
    inputs = make_inputs(batch=1, length=41)
    query = run(kernels, inputs, terms(inputs), config=SMALL)[2]
    assert query.shape == (2, 1, 4, 2, 32)
    assert (query[..., 1, 9:] == 0).all() and (query[..., 1, :9] != 0).all()


@interpreted
def test_operands_of_half_precision(kernels):
    inputs = make_inputs(groups=2, documents=True, dtype=torch.float16)  # Triton's interpreter has no bf16 products
    want = terms(inputs)
    assert_near(run(kernels, inputs, want, splits=2)[0], want, 1e-3)
