"""One gloo rank for the modules of this folder that build models."""

import pytest
import torch

import falcon_bridge  # noqa: F401  before megatron.bridge, which it makes importable without Transformer Engine
from falcon_bridge.compat import cpu_runtime


@pytest.fixture(scope="module")
def process_groups(tmp_path_factory):
    """Megatron's process groups of a single rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with cpu_runtime():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank(process_groups):
    """A CPU where Megatron finds what it expects of CUDA, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with cpu_runtime():
        yield
    torch.set_num_threads(threads)
