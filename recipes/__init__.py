"""Recipes: functions that return a ready ``ConfigContainer`` of Megatron Bridge.

    from falcon_bridge.recipes import falcon_h1_7b_pretrain_config

They take no arguments, but for the ``peft_scheme`` ("lora", "dora") of those that train adapters. Importing this
package is cheap; a recipe's module, and Megatron with it, is imported when a recipe is taken from here.
"""

from importlib import import_module


_PRETRAIN_GPUS = {"90m": 1, "500m": 1, "500m_bitnet": 1, "1p5b": 1, "1p5b_deep": 1, "3b": 8, "7b": 8, "34b": 32}
_SFT_GPUS = {"90m": 1, "500m": 1, "1p5b": 8, "1p5b_deep": 8, "3b": 8, "7b": 8, "34b": 32}
_PEFT_GPUS = {"90m": 1, "500m": 1, "1p5b": 1, "1p5b_deep": 1, "3b": 1, "7b": 2, "34b": 8}
_LONG_GPUS = {
    "90m_128k": 8,
    "90m_256k": 8,
    "1p5b_128k": 8,
    "1p5b_deep_128k": 8,
    "3b_128k": 8,
    "7b_128k": 16,
    "7b_256k": 32,
    "34b_128k": 64,
    "34b_256k": 128,
}
_EDGE_GPUS = {
    "1b_pretrain": 1,
    "1b_two_stage_pretrain": 1,
    "1b_sft": 1,
    "3b_pretrain": 8,
    "3b_two_stage_pretrain": 8,
    "3b_sft": 8,
}

RECIPES: dict[str, str] = {
    **{f"falcon_h1_tiny_cpu_{task}_config": "falcon_h1_tiny" for task in ("pretrain", "sft", "peft")},
    **{f"falcon_h1_{size}_pretrain_config": "falcon_h1" for size in _PRETRAIN_GPUS},
    **{f"falcon_h1_{size}_pretrain_config": "falcon_h1_long" for size in _LONG_GPUS},
    **{f"falcon_h1_{size}_sft_config": "falcon_h1_finetune" for size in _SFT_GPUS},
    **{f"falcon_h1_{size}_peft_config": "falcon_h1_finetune" for size in _PEFT_GPUS},
    **{f"falcon_edge_{name}_config": "falcon_edge" for name in ("tiny_cpu_pretrain", "tiny_cpu_sft", *_EDGE_GPUS)},
}
"""Name of every recipe and the module of this package that has it."""

GPUS: dict[str, int] = {
    **{f"falcon_h1_{size}_pretrain_config": gpus for size, gpus in {**_PRETRAIN_GPUS, **_LONG_GPUS}.items()},
    **{f"falcon_h1_{size}_sft_config": gpus for size, gpus in _SFT_GPUS.items()},
    **{f"falcon_h1_{size}_peft_config": gpus for size, gpus in _PEFT_GPUS.items()},
    **{f"falcon_edge_{name}_config": gpus for name, gpus in _EDGE_GPUS.items()},
}
"""How many 80 GB GPUs a recipe is laid out for, at least; the recipes for the CPU are not in it."""

__all__ = ["GPUS", "RECIPES", *RECIPES]


def __getattr__(name: str):
    if name not in RECIPES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{RECIPES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *RECIPES])
