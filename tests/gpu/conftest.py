import json
import os

import pytest
import torch

from tests.gpu.rank import FULL_PRECISION, ONE_KERNEL_CONFIG, own_rank


@pytest.fixture(scope="session", autouse=True)
def one_rank(tmp_path_factory):
    """One NCCL rank with Megatron's model-parallel groups."""
    if not torch.cuda.is_available():
        yield
        return
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def fp32_rank():
    """``run(fn, *args)`` in a process of its own where fp32 means fp32: no TF32 in cuBLAS, nor in Triton's dots."""
    with own_rank({**ONE_KERNEL_CONFIG, **FULL_PRECISION}) as run:
        yield run


@pytest.fixture(scope="session")
def rank():
    """``run(fn, *args)`` in a process of its own, whose kernels are not tuned."""
    with own_rank(ONE_KERNEL_CONFIG) as run:
        yield run


@pytest.fixture(scope="session")
def report():
    """Print a line of figures, and append it to the file that FALCON_BRIDGE_GPU_REPORT names."""

    def write(**figures) -> None:
        line = json.dumps(figures)
        print(line)
        if path := os.environ.get("FALCON_BRIDGE_GPU_REPORT"):
            with open(path, "a") as log:
                log.write(line + "\n")

    return write
