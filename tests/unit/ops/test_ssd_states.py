"""The kernels of the scan's states in Triton's interpreter, fp32 on the CPU, against the dense oracle in fp64."""

import pytest
import torch

from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter
from tests.unit.ops.ssd_terms import make_inputs, terms


CASES = [
    {},
    {"documents": True},
    {"documents": True, "groups": 2, "heads": 6, "head_dim": 32, "d_state": 16, "chunk": 16},
    {"length": 64, "groups": 2, "documents": True},  # whole chunks only
    {"length": 21},  # less than a chunk
    {"length": 70, "batch": 1, "heads": 2, "head_dim": 64, "d_state": 128, "documents": True},
]


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=14)


@pytest.fixture(scope="module")
def kernels():
    from falcon_bridge.ops.ssd.kernels import states

    return states


def run(kernels, inputs, want, config=None):
    """States, their gradients and that of the decays, the latter from the oracle's states rounded to x's dtype."""
    dt, log2_decay = want["dt"].float(), want["log2_decay"].float()
    states = kernels.chunk_states(inputs.x, inputs.b, dt, log2_decay, inputs.seq_idx, config=config)
    before = want["states"].to(inputs.x.dtype)
    dstates, decay_grad = kernels.chunk_state_gradients(
        inputs.dy, inputs.c, log2_decay, before, inputs.seq_idx, config=config
    )
    return {"states": states, "dstates": dstates, "decay_grad": decay_grad}


def check(got, want, tolerance):
    for name, value in got.items():
        value = value.sum(0) if name == "decay_grad" else value
        worst = (value.double() - want[name]).abs().max() / want[name].abs().max().clamp_min(1e-30)
        assert value.shape == want[name].shape and worst <= tolerance, f"{name}: {worst}"


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(kernels, case):
    inputs = make_inputs(**case)
    want = terms(inputs)
    check(run(kernels, inputs, want), want, 2e-5)


@interpreted
@pytest.mark.parametrize("blocks", [(16, 16), (32, 64), (64, 32)])
def test_blocks_of_the_state(kernels, blocks):
    inputs = make_inputs(heads=2, head_dim=64, d_state=64, documents=True, seed=3)
    want = terms(inputs)
    got = run(kernels, inputs, want, {"BLOCK_P": blocks[0], "BLOCK_N": blocks[1]})
    assert got["decay_grad"].shape[0] == 64 // blocks[0] * (64 // blocks[1])
    check(got, want, 2e-5)


@interpreted
def test_rows_whose_strides_have_no_factor(kernels):
    inputs = make_inputs(length=40, batch=1)
    for name in ("x", "b", "c", "dy"):
        rows = getattr(inputs, name)
        wider = torch.nn.functional.pad(rows.flatten(2), (0, 3))
        setattr(inputs, name, wider[..., :-3].unflatten(2, rows.shape[2:]))
    want = terms(inputs)
    check(run(kernels, inputs, want), want, 2e-5)


@interpreted
def test_fp16_rounds_states_and_operands(kernels):
    inputs = make_inputs(documents=True, dtype=torch.float16)  # the interpreter's product of bf16 is none
    want = terms(inputs)
    got = run(kernels, inputs, want)
    assert got["states"].dtype == got["dstates"].dtype == torch.float16
    check(got, want, 1e-3)


@interpreted
@pytest.mark.parametrize(("rows", "head_dim", "d_state"), [(96, 64, 128), (96, 64, 256), (24, 128, 256)])
def test_the_launch_fills_the_processors(kernels, rows, head_dim, d_state):
    for backward in (False, True):
        config = kernels.launch_config(rows, head_dim, d_state, 128, 2, backward=backward)
        assert rows * (head_dim // config["BLOCK_P"]) * (d_state // config["BLOCK_N"]) >= 96
