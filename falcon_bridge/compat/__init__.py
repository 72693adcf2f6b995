"""What falcon_bridge must arrange with its surroundings: absent packages, machines without CUDA, upstream internals.

Importing this package loads torch and nothing heavier; Megatron is imported when a function here is called.
"""

from falcon_bridge.compat.cpu import cpu_runtime
from falcon_bridge.compat.imports import allow_missing_dependencies
from falcon_bridge.compat.upstream import patch_missing_helpers_makefile


__all__ = ["allow_missing_dependencies", "cpu_runtime", "patch_missing_helpers_makefile"]
