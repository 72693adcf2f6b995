"""Which code runs the scan: this package's Triton kernels, mamba-ssm's, or pure torch."""

import functools
from typing import Literal

import torch


ScanBackend = Literal["triton", "mamba_ssm", "torch"]

_WANTED = ("auto", "triton", "mamba_ssm", "torch")
_HEAD_DIMS, _STATES = (16, 32, 64, 128), (16, 32, 64, 128, 256)
# of head sizes beyond, ours have only been compiled for a GPU and interpreted: "auto" does not take them yet
_LARGEST_SHOWN = 64
# what a program may take of a multiprocessor's shared memory on Hopper, for which the kernels' blocks are chosen
_SHARED_MEMORY = 232_448


def scan_backend(
    wanted: Literal["auto", "triton", "mamba_ssm", "torch"],
    head_dim: int,
    d_state: int,
    device: torch.device | None,
) -> ScanBackend:
    """What runs where `wanted` is asked for.

    Args:
        wanted: `ssm_backend`. "auto" takes torch on the CPU; on a GPU our kernels if the GPU fits them and they have
            been shown on one for head sizes like this, mamba-ssm's otherwise.
        head_dim: Channels of an SSM head.
        d_state: State size.
        device: Of the tensors; None for a GPU like those that the kernels are made for.

    Raises:
        ValueError: If `wanted` is none of these, or "triton" for a CPU or sizes that the kernels do not take.
    """
    if wanted not in _WANTED:
        raise ValueError(f"ssm_backend={wanted!r} is not known: use one of {', '.join(_WANTED)}")
    on_gpu = device is None or device.type == "cuda"
    if wanted in ("torch", "mamba_ssm"):
        return wanted
    if wanted == "auto" and not on_gpu:
        return "torch"
    fits = head_dim in _HEAD_DIMS and d_state in _STATES
    if wanted == "triton":
        if not on_gpu or not fits:
            raise ValueError(
                f"ssm_backend=triton needs a GPU, a head size of {_HEAD_DIMS} and a state size of {_STATES}, not "
                f"{head_dim} and {d_state} on {device or 'a GPU'}: set ssm_backend=auto"
            )
        return "triton"
    shown = fits and head_dim <= _LARGEST_SHOWN
    return "triton" if shown and (device is None or _has_room(device)) else "mamba_ssm"


@functools.cache
def _has_room(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= _SHARED_MEMORY


def default_chunk(itemsize: int) -> int:
    """Tokens a chunk for our kernels: what they are tuned for, less where an element takes four bytes of each tile."""
    return 128 if itemsize == 2 else 64
