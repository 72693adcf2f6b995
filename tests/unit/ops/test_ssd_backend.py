"""Which code scans."""

import pytest
import torch

from falcon_bridge.ops.ssd import backend
from falcon_bridge.ops.ssd.backend import scan_backend


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("wanted", "sizes", "device", "room", "found"),
    [
        ("auto", (64, 128), CPU, True, "torch"),
        ("auto", (64, 128), GPU, True, "triton"),
        ("auto", (64, 128), None, True, "triton"),
        ("auto", (64, 128), GPU, False, "mamba_ssm"),  # a GPU with less shared memory
        ("auto", (96, 128), GPU, True, "mamba_ssm"),
        ("auto", (128, 256), GPU, True, "mamba_ssm"),  # not run on a GPU yet
        ("triton", (128, 256), GPU, True, "triton"),
        ("auto", (64, 512), GPU, True, "mamba_ssm"),
        ("mamba_ssm", (64, 128), GPU, True, "mamba_ssm"),
        ("torch", (64, 128), GPU, True, "torch"),
        ("triton", (64, 128), GPU, False, "triton"),
    ],
)
def test_what_runs(monkeypatch, wanted, sizes, device, room, found):
    monkeypatch.setattr(backend, "_has_room", lambda device: room)
    assert scan_backend(wanted, *sizes, device) == found


@pytest.mark.parametrize(("sizes", "device"), [((96, 128), GPU), ((64, 8), GPU), ((64, 128), CPU)])
def test_what_our_kernels_cannot_do_is_said(sizes, device):
    with pytest.raises(ValueError, match=r"ssm_backend=triton needs a GPU, a head size of .* set ssm_backend=auto"):
        scan_backend("triton", *sizes, device)


@pytest.mark.parametrize("wanted", ["mamba", None])
def test_another_name_is_refused(wanted):
    with pytest.raises(ValueError, match=r"ssm_backend=.* is not known: use one of auto, triton, mamba_ssm, torch"):
        scan_backend(wanted, 64, 128, CPU)
