"""Which devices a verb may use."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def cpu_only() -> Iterator[None]:
    """Hide this machine's GPUs from what is imported and started inside.

    `compat.cpu_runtime` stands back where CUDA is available; a job that is meant for the CPU must not see any.
    """
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
