"""The kernel of the scan's output in Triton's interpreter, on the CPU, against the dense formulas in fp64."""

import pytest
import torch

from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter
from tests.unit.ops.ssd_terms import make_inputs, terms


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=12)


@pytest.fixture(scope="module")
def kernels():
    from falcon_bridge.ops.ssd.kernels import output

    return output


def outputs(kernels, inputs, found, dtype=torch.float32, **config):
    """`chunk_outputs` into a part of wider, sequence-first rows, whose rest must stay as it was."""
    batch, length, heads, head_dim = inputs.x.shape
    inner = heads * head_dim
    rows = torch.full((length + 1, batch, inner + 8), 7.0, dtype=dtype)
    out = rows[:length].transpose(0, 1)[..., :inner].unflatten(2, (heads, head_dim))
    dt, log2_decay, states = found["dt"].float(), found["log2_decay"].float(), found["states"].to(dtype)
    operands = (inputs.x, inputs.b, inputs.c, dt, log2_decay, states, inputs.d, inputs.seq_idx)
    assert kernels.chunk_outputs(*operands, out, config=config) is out
    assert (rows[..., inner:] == 7).all() and (rows[length] == 7).all()
    return out.double()


def assert_close(got, want, bound):
    """The largest error of each head is below `bound` of its largest element."""
    assert got.shape == want.shape
    error = ((got - want).abs().amax((0, 1, 3)) / want.abs().amax((0, 1, 3))).max()
    assert error <= bound, float(error)


@interpreted
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ({"heads": 4}, {"heads": 3, "block_m": 16}),  # a block of heads that is not full; two blocks of rows
        ({"heads": 6, "groups": 2, "head_dim": 32, "d_state": 16}, {"heads": 2, "block_m": 16}),
        ({"heads": 3, "length": 129, "chunk": 64, "batch": 1}, {"block_m": 32, "block_k": 16, "block_p": 16}),
        ({"heads": 2, "head_dim": 64, "d_state": 128, "chunk": 128, "length": 300, "batch": 1}, {}),
        ({"heads": 5, "groups": 5, "d_state": 64, "length": 67, "batch": 3}, {"heads": 8}),  # more than a group has
    ],
)
def test_outputs(kernels, shape, config, documents):
    inputs = make_inputs(documents=documents, **shape)
    found = terms(inputs)
    assert_close(outputs(kernels, inputs, found, **config), found["y"], 2e-5)


@interpreted
def test_a_row_that_is_shorter_than_a_chunk(kernels):
    inputs = make_inputs(length=9, heads=3, batch=3)
    found = terms(inputs)
    assert_close(outputs(kernels, inputs, found, block_m=16), found["y"], 2e-5)


@interpreted
def test_half_precision(kernels):
    inputs = make_inputs(dtype=torch.float16, documents=True, heads=3)  # the interpreter has no products of bf16
    found = terms(inputs)
    assert_close(outputs(kernels, inputs, found, torch.float16), found["y"], 2e-3)


@interpreted
def test_steep_decays_stay_finite(kernels):
    """Above the diagonal the decays' exponents reach thousands."""
    inputs = make_inputs(heads=3)
    inputs.a *= 300
    found = terms(inputs)
    got = outputs(kernels, inputs, found)
    assert got.isfinite().all()
    assert_close(got, found["y"], 2e-4)  # decays of that size are rounded


@interpreted
def test_strides_that_no_wide_load_fits(kernels):
    inputs = make_inputs(heads=2, documents=True)
    wide = torch.cat([inputs.x.transpose(0, 1).flatten(2), torch.zeros(75, 2, 3)], dim=2).transpose(0, 1)
    inputs.x = wide[..., :32].unflatten(2, (2, 16))
    found = terms(inputs)
    assert_close(outputs(kernels, inputs, found), found["y"], 2e-5)


@interpreted
def test_heads_of_a_program(kernels):
    """Few heads where few chunks would leave processors idle, many where there are programs enough."""
    assert [kernels._heads(24, programs) for programs in (16, 63, 64, 128, 256, 2000)] == [4, 4, 6, 12, 24, 24]
    assert kernels._heads(3, 2000) == 3


@interpreted
@pytest.mark.parametrize(("block_m", "wanted"), [(16, "64 or 32"), (128, "64 or 32")])
def test_blocks_that_do_not_cover_a_chunk(kernels, block_m, wanted):
    inputs = make_inputs(chunk=64, length=129, heads=2)
    with pytest.raises(ValueError, match=f"block_m {block_m}: give {wanted}"):
        outputs(kernels, inputs, terms(inputs), block_m=block_m)
