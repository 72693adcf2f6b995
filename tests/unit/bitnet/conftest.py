"""One gloo rank for the modules of this folder that build Megatron's linears."""

import pytest
import torch
import torch.distributed as dist

from falcon_bridge.compat import allow_missing_dependencies


allow_missing_dependencies()


@pytest.fixture(scope="module")
def one_rank():
    """The process group of a single rank, as tensor-parallel group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
    torch.set_num_threads(threads)
