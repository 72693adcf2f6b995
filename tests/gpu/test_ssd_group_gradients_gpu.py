"""The kernel of B's and C's gradients on the GPU, in bf16 and several tiles, against the dense formulas in fp64."""

import pytest
import torch

from tests.unit.ops.ssd_terms import make_inputs, terms


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SHAPES = {
    "0.5B": {"heads": 4, "head_dim": 64, "d_state": 128, "chunk": 128},
    "1.5B, chunks of 64": {"heads": 4, "head_dim": 64, "d_state": 256, "chunk": 64},
    "34B": {"heads": 4, "head_dim": 128, "d_state": 256, "groups": 2, "chunk": 128},
    "chunks of 256": {"batch": 1, "length": 600, "heads": 2, "head_dim": 64, "d_state": 128, "chunk": 256},
    "small": {"heads": 6, "head_dim": 16, "d_state": 16, "groups": 2, "chunk": 16, "length": 45},
}
CONFIGS = {
    "shipped": None,
    "tiles of half a chunk": {"block_m": 64, "num_warps": 4},
    "wide tiles, a launch a gradient": {"block_n": 256, "num_stages": 2, "one_launch": False},
    "few registers": {"num_stages": 2, "maxnreg": 128},
}


def compute(inputs, want, config=None, splits=2):
    from falcon_bridge.ops.ssd.kernels.group_gradients import group_gradients

    dtype = inputs.x.dtype
    db, dc = (torch.full_like(inputs.b.transpose(0, 1).contiguous(), 7).transpose(0, 1) for _ in range(2))
    shares = torch.linspace(0.5, 1.5, splits, device="cuda")
    dscores = want["dscores"].float() * (shares / shares.sum()).view(-1, 1, 1, 1, 1, 1)
    per_token = [want[name].float() for name in ("dt", "log2_decay")]
    states = [want[name].to(dtype) for name in ("states", "dstates")]
    query = group_gradients(
        inputs.dy, inputs.x, inputs.b, inputs.c, *per_token, *states, dscores, inputs.seq_idx, db, dc, config
    )
    return {"query": query.sum(0), "db": db, "dc": dc}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_against_fp64(shape, config):
    options = {"length": 300, **SHAPES[shape]}
    if SHAPES[shape]["head_dim"] == 128 and CONFIGS[config] is not None and "block_n" in CONFIGS[config]:
        pytest.skip("tiles that do not fit")
    inputs = make_inputs(**options, documents=True, dtype=torch.bfloat16)
    want = {name: value.cuda() for name, value in terms(inputs).items()}
    inputs = inputs.cuda()
    got = compute(inputs, want, CONFIGS[config])
    for name, value in got.items():
        error, scale = (value.double() - want[name]).abs().max(), want[name].abs().max()
        assert error <= 1e-2 * scale, (name, error, scale)
    again = compute(inputs, want, CONFIGS[config])
    assert all(torch.equal(value, again[name]) for name, value in got.items())
