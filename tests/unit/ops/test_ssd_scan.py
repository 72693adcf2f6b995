"""The scan by our Triton kernels from end to end in Triton's interpreter, fp32 on the CPU, against the fp64 oracle."""

import pytest
import torch

from tests.unit.interpreter import interpreted, not_interpreted, run_in_interpreter
from tests.unit.ops.ssd_terms import make_inputs, terms


@not_interpreted
def test_in_the_interpreter():
    run_in_interpreter(__file__, tests=5)


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        {"groups": 2, "documents": True},
        {"groups": 1, "heads": 3, "head_dim": 32, "d_state": 16, "length": 64},
        {"groups": 1, "length": 21, "documents": False},
        {"batch": 1, "heads": 2, "chunk": 128, "length": 300, "documents": True},  # two blocks of a chunk
        {"groups": 2, "heads": 6, "head_dim": 16, "d_state": 64, "chunk": 16, "length": 50, "documents": True},
    ],
)
def test_forward_and_backward(case):
    from falcon_bridge.ops.ssd.kernels.scan import scan_backward, scan_forward

    inputs = make_inputs(**case)
    want = terms(inputs)
    steps = inputs.raw_dt, inputs.dt_scale, inputs.dt_bias, inputs.a, inputs.d, inputs.seq_idx, inputs.chunk
    found = {"y": scan_forward(inputs.x, inputs.b, inputs.c, *steps)}
    names = ("dx", "db", "dc", "draw_dt")
    like = (inputs.x, inputs.b, inputs.c, inputs.raw_dt)
    found |= {name: torch.full_like(one, torch.nan) for name, one in zip(names, like, strict=True)}
    written = {name: found[name] for name in names}
    sums = scan_backward(inputs.dy, found["y"], inputs.x, inputs.b, inputs.c, *steps, **written)
    found |= dict(zip(("da", "ddt_bias", "dd"), sums, strict=True))
    for name, value in found.items():
        error = (value.double() - want[name]).abs().max() / want[name].abs().max()
        assert error <= 2e-5, (name, error)
