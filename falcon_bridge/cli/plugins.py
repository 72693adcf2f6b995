"""Megatron Bridge's run plugins by name, as ``launch --plugin`` takes them."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from falcon_bridge.errors import UserError, one_line, suggestion


PLUGINS = {
    "preemption": "PreemptionPlugin",
    "fault_tolerance": "FaultTolerancePlugin",
    "nsys": "NsysPlugin",
    "pytorch_profiler": "PyTorchProfilerPlugin",
    "wandb": "WandbPlugin",
    "comet": "CometPlugin",
}
"""Name of each plugin and its class in ``megatron.bridge.recipes.run_plugins``."""

_API_KEYS = {"wandb": "WANDB_API_KEY", "comet": "COMET_API_KEY"}


def make_plugins(texts: Iterable[str]) -> list[Any]:
    """Plugins of the form that ``--plugin`` has.

    Args:
        texts: ``NAME`` or ``NAME.KEY=VALUE`` each, in Hydra's syntax; those of one name make one plugin.

    Returns:
        Plugins of ``megatron.bridge.recipes.run_plugins``, in the order in which they were first named.

    Raises:
        UserError: an unknown name or key, a value of the wrong type, a plugin without a value that it needs, one that
            would do nothing, or two that exclude each other.
    """
    asked: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, keys = _parsed(text)
        asked.setdefault(name, {}).update(keys)
    if {"nsys", "fault_tolerance"} <= asked.keys():
        raise UserError("--plugin nsys and --plugin fault_tolerance exclude each other: use one of them")
    return [_make(name, keys) for name, keys in asked.items()]


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    path, assigned, _ = text.partition("=")
    name, dot, key = path.partition(".")
    if name not in PLUGINS:
        raise UserError(f"unknown plugin '{name}'{suggestion(name, PLUGINS) or f': use {", ".join(PLUGINS)}'}")
    if not dot and not assigned:
        return name, {}
    if not key or not assigned:
        raise UserError(f"--plugin '{text}': write NAME or NAME.KEY=VALUE, as in preemption.preempt_time=120")
    try:
        return name, {key: OverridesParser.create().parse_override(text).value()}
    except HydraException as error:
        raise UserError(f"--plugin '{text}' cannot be read ({one_line(error)}): write NAME.KEY=VALUE") from error


def _make(name: str, keys: dict[str, Any]) -> Any:
    from megatron.bridge.recipes import run_plugins

    from falcon_bridge.training.limits import check_type

    plugin = getattr(run_plugins, PLUGINS[name])
    fields = {field.name: field for field in dataclasses.fields(plugin) if field.name != "script_args_converter_fn"}
    for key, value in keys.items():
        if key not in fields:
            known = suggestion(key, fields) or f": it has {', '.join(fields)}"
            raise UserError(f"unknown key '{key}' of plugin {name}{known}")
        default = fields[key].default
        check_type(f"{name}.{key}", None if default is dataclasses.MISSING else default, value, fields[key].type)
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in keys]
    if missing:
        needed = " and ".join(f"--plugin {name}.{key}=…" for key in missing)
        raise UserError(f"plugin {name} needs {needed}")
    variable = _API_KEYS.get(name)
    if variable and variable not in os.environ:
        raise UserError(f"plugin {name} does nothing without an API key: set {variable}")
    return plugin(**keys)
