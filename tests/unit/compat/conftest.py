import contextlib
import os

import pytest

from falcon_bridge.compat import allow_missing_dependencies, patch_missing_helpers_makefile


allow_missing_dependencies()


@pytest.fixture(scope="session", autouse=True)
def megatron_bridge():
    """Megatron Bridge's training modules, imported once for everything in this folder (they take 10 to 20 s)."""
    import megatron.bridge.peft.lora_layers
    import megatron.bridge.training.pretrain

    patch_missing_helpers_makefile()
    return megatron.bridge


@contextlib.contextmanager
def clean_process_state():
    """Megatron's process-wide state is gone afterwards, also after a run that failed half way."""
    import torch
    from megatron.bridge.training.initialize import destroy_global_state
    from megatron.core.tensor_parallel import random

    environment = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    tracker = random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED
    random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = None, False
    try:
        yield
    finally:
        random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = tracker
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        destroy_global_state()
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture
def clean_state():
    with clean_process_state():
        yield
