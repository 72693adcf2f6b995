"""Recipes: functions without arguments that return a ready ``ConfigContainer`` of Megatron Bridge.

    from falcon_bridge.recipes import falcon_h1_7b_pretrain_config

Importing this package is cheap; a recipe's module, and Megatron with it, is imported when a recipe is taken from here.
"""

from importlib import import_module


RECIPES: dict[str, str] = {
    "falcon_h1_tiny_cpu_pretrain_config": "falcon_h1_tiny",
    **{
        f"falcon_h1_{size}_pretrain_config": "falcon_h1"
        for size in ("90m", "500m", "1p5b", "1p5b_deep", "3b", "7b", "34b")
    },
}
"""Name of every recipe and the module of this package that has it."""

__all__ = [*RECIPES]


def __getattr__(name: str):
    if name not in RECIPES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{RECIPES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *RECIPES])
