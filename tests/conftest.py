import os

import pytest
import torch


os.environ["HF_HUB_OFFLINE"] = "1"  # whatever a test needs, it makes
# forked ranks and examples tokenize, too, and would wait for ever for threads that only the parent has
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
