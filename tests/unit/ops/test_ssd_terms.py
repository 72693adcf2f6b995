"""The dense formulas that the scan's Triton kernels are tested against, against autograd through the recurrence."""

import pytest
import torch

from falcon_bridge.ops.ssd.naive import ssd_recurrent
from tests.unit.ops.ssd_terms import Inputs, make_inputs, terms


def recurrent_terms(inputs: Inputs) -> dict[str, torch.Tensor]:
    """y and the gradients of the scan's inputs, by the names of `terms`, fp64."""
    names = ("x", "b", "c", "raw_dt", "dt_bias", "a", "d")
    given = {name: getattr(inputs, name).detach().double().requires_grad_() for name in names}
    dt = torch.nn.functional.softplus(given["raw_dt"] * inputs.dt_scale + given["dt_bias"], threshold=100)
    operands = (given["x"], dt, *(given[name] for name in ("a", "b", "c", "d")))
    y, _ = ssd_recurrent(*operands, seq_idx=inputs.seq_idx)
    y.backward(inputs.dy.double())
    gradients = {"ddt_bias" if name == "dt_bias" else f"d{name}": tensor.grad for name, tensor in given.items()}
    return {"y": y.detach(), **gradients}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"groups": 2, "head_dim": 8, "d_state": 16, "chunk": 16, "length": 64, "seed": 1},  # whole chunks
        {"groups": 2, "heads": 6, "batch": 1, "length": 70, "seed": 2},
    ],
)
def test_terms_are_what_autograd_finds_in_the_recurrence(case, documents):
    inputs = make_inputs(**case, documents=documents)
    found = terms(inputs)
    for name, want in recurrent_terms(inputs).items():
        error = (found[name] - want).abs().max() / want.abs().max()
        assert error <= 1e-10, f"{name}: {float(error):.1e}"


def test_a_row_shorter_than_a_chunk():
    inputs = make_inputs(length=9, batch=3, heads=3)
    found = terms(inputs)
    for name, want in recurrent_terms(inputs).items():
        assert (found[name] - want).abs().max() <= 1e-10 * want.abs().max(), name
    assert (found["log2_decay"][..., 9:] == found["log2_decay"][..., 8:9]).all()
