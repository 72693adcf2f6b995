"""BitNet b1.58 linears for Megatron: ternary weights and int8 activations, exact under any parallel layout.

The linear layers import Megatron when they are first asked for; everything else here is torch alone.
"""

from importlib import import_module


_LAZY = {
    "BitNetColumnParallelLinear": "linear",
    "BitNetRowParallelLinear": "linear",
    "check_bitnet": "validation",
    "invalidate": "codes",
    "quantization_strength": "strength",
    "set_quantization_strength": "strength",
    "TERNARY_MODULES": "modules",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'falcon_bridge.bitnet' has no attribute {name!r}")
    return getattr(import_module(f"falcon_bridge.bitnet.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
