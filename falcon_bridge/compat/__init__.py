"""What falcon_bridge must arrange with its surroundings: absent packages, machines without CUDA, upstream internals.

Importing this package is cheap: torch is imported with `cpu_runtime`, and Megatron when a function here is called.
"""

from falcon_bridge.compat.imports import allow_missing_dependencies
from falcon_bridge.compat.upstream import patch_missing_helpers_makefile


__all__ = ["allow_missing_dependencies", "cpu_runtime", "patch_missing_helpers_makefile"]


def __getattr__(name: str):
    if name != "cpu_runtime":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from falcon_bridge.compat.cpu import cpu_runtime

    return cpu_runtime
