import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Ranks are forked from here: no thread pool may be running, and two cores are shared by up to four ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
