"""A process on the GPU with an environment of its own, that runs one function after the other.

What reads its environment when it is imported (cuBLAS, Triton, mamba-ssm) cannot be told later, and importing Megatron
Bridge takes half a minute: so one process for each environment, and not one for each test.
"""

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from falcon_bridge.verification.batch import Batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.verify import use_full_precision


TIMEOUT_SECONDS = 400

# mamba-ssm then takes the cheapest configuration of each kernel instead of timing all of them, which costs 100 s for
# each shape and dtype, and adds up without atomics
ONE_KERNEL_CONFIG = {"MAMBA_DETERMINISTIC": "1", "TRITON_CACHE_AUTOTUNING": "0"}
FULL_PRECISION: dict[str, str] = {}
use_full_precision(FULL_PRECISION.__setitem__)

# with state and chunk like this the kernels compile once for all configs, and 150 tokens cross two borders of chunks
STATE, CHUNK, HEAD = 64, 64, 32
SEQUENCE = 150


@contextlib.contextmanager
def own_rank(environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Yield a function that runs a picklable function in the process, and returns or raises what that does."""
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            with mock.patch.dict(os.environ, environment):
                pool.submit(_start, str(Path(directory) / "store")).result(TIMEOUT_SECONDS)
            yield lambda fn, *args: pool.submit(_call, fn, args).result(TIMEOUT_SECONDS)
            pool.submit(_stop).result(TIMEOUT_SECONDS)


def _start(store: str) -> None:
    import logging

    import torch

    logging.disable(logging.WARNING)
    # Megatron Bridge asks for them
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    torch.backends.cudnn.allow_tf32 = False
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
        backend = "nccl"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)


def _call(fn: Callable[..., Any], args: tuple) -> Any:
    from falcon_bridge.compat import cpu_runtime

    with cpu_runtime():  # does nothing where there is a GPU
        return fn(*args)


def _stop() -> None:
    import torch

    torch.distributed.destroy_process_group()


def checkpoint(directory: Path, name: str, *, seed: int = 7, **overrides: Any) -> Path:
    """The random checkpoint `name`, with heads, state and chunk of the SSM as the kernels take them."""
    fields = {"mamba_d_state": STATE, "mamba_chunk_size": CHUNK, **overrides}
    config = random_config(name, **fields)
    if name != "expand" and "mamba_d_ssm" not in overrides:
        fields["mamba_d_ssm"] = HEAD * config.mamba_n_heads
    return write_random_checkpoint(directory / name, name, seed=seed, **fields)


def documents(batch: Batch) -> list[Batch]:
    """Each document of a packed batch as a batch of its own."""
    return [Batch(tokens) for tokens in batch.tokens.split(list(batch.documents), dim=1)]
