"""Train Falcon-H1 and Falcon-Edge on Megatron.

Importing this package registers its bridges with Megatron Bridge, whichever of the two is imported first:

    import falcon_bridge
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained("tiiuae/Falcon-H1-7B-Base").to_megatron_provider()

Megatron itself, which takes many seconds to import, is loaded when it is first used: by `megatron.bridge`, or by one
of the names below.
"""

from importlib import import_module

from falcon_bridge import bitnet  # noqa: F401  `falcon_bridge.bitnet.BitNetColumnParallelLinear`; imports no torch
from falcon_bridge.compat.imports import allow_missing_dependencies
from falcon_bridge.compat.post_import import when_imported
from falcon_bridge.registration import register


__version__ = "0.1.0"

_H1, _EDGE = "falcon_bridge.models.falcon_h1", "falcon_bridge.models.falcon_edge"
_LAZY = {
    "FalconH1ModelProvider": f"{_H1}.provider",
    **{
        f"FalconH1ModelProvider{size}": f"{_H1}.sizes"
        for size in ("90M", "500M", "1P5B", "1P5BDeep", "3B", "7B", "34B")
    },
    "FalconH1Bridge": f"{_H1}.bridge",
    "FalconEdgeModelProvider": f"{_EDGE}.provider",
    "FalconEdgeModelProvider1B": f"{_EDGE}.sizes",
    "FalconEdgeModelProvider3B": f"{_EDGE}.sizes",
    "FalconEdgeBridge": f"{_EDGE}.bridge",
    "falcon_h1_multipliers": f"{_H1}.mup",
}

__all__ = sorted(_LAZY)

allow_missing_dependencies()
when_imported("megatron.bridge", register)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'falcon_bridge' has no attribute {name!r}")
    import_module("megatron.bridge")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
