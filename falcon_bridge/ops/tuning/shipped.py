"""Gives mamba-ssm's Triton kernels shipped configurations instead of timing all of them in the first step.

They scan where `ssm_backend` asks for them or our own kernels, which need no table, do not fit (`ops.ssd.backend`).
mamba-ssm tunes each of its kernels at the first call of every combination of sizes and dtypes: some 130 compilations
and timings, 95 to 116 s of the first step on an H100. Triton's own cache of the results (TRITON_CACHE_AUTOTUNING) is
per machine, and never holds the kernels that zero a buffer first, a third of these. So the choices for the released
sizes are shipped, one file an architecture, made by `benchmarks/tune_ssm.py`. They also make every start and every
rank run the same kernels, which timing does not.
"""

import functools
import importlib
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from falcon_bridge.errors import UserError
from falcon_bridge.ops.tuning.table import CallKey, Config, KernelTable, TuningTable


if TYPE_CHECKING:
    import triton
    from triton.runtime import Autotuner


logger = logging.getLogger(__name__)

SWITCH = "FALCON_BRIDGE_TUNING"
"""Environment variable: "shipped" (the default), "autotune", or the path of another table."""

KERNEL_MODULES = ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_combined", "ssd_state_passing")


@functools.cache
def use_shipped_tuning() -> None:
    """Take the configurations of mamba-ssm's kernels from the table of this GPU; call it before the first of them.

    Needs mamba-ssm; the current CUDA device decides which table. Nothing is timed for the sizes and dtypes in the
    table. Others take the choice of the most similar call of the same kernel, which the log says; where that needs
    more than the GPU has, and for kernels and GPUs without a table, Triton times all configurations as ever.

    Raises:
        UserError: FALCON_BRIDGE_TUNING names neither a mode nor a table.
    """
    mode = os.environ.get(SWITCH, "shipped")
    if mode == "autotune" or not torch.cuda.is_available():
        return
    if mode == "shipped":
        path = shipped_table(torch.cuda.get_device_capability())
        if not path.exists():
            logger.info(
                "no tuning table for %s: mamba-ssm's kernels are timed in the first step; benchmarks/tune_ssm.py "
                "writes a table for %s=PATH",
                path.stem,
                SWITCH,
            )
            return
    elif mode.endswith(".json"):
        path = Path(mode)
    else:
        raise UserError(f"{SWITCH}={mode!r} is not known: use 'shipped', 'autotune', or the path of a .json table")
    use_table(TuningTable.read(path), mamba_ssm_kernels())


def shipped_table(capability: tuple[int, int]) -> Path:
    """Where the table of a compute capability is, if it is shipped: ``sm90.json`` for (9, 0)."""
    return Path(__file__).with_name("sm{}{}.json".format(*capability))


def mamba_ssm_kernels() -> dict[str, "Autotuner"]:
    """The autotuned kernels of mamba-ssm's chunked scan, by function name."""
    from triton.runtime import Autotuner

    modules = [importlib.import_module(f"mamba_ssm.ops.triton.{name}") for name in KERNEL_MODULES]
    found = (value for module in modules for value in vars(module).values() if isinstance(value, Autotuner))
    return {kernel.base_fn.__name__: kernel for kernel in found}


def own_configs(kernel: "Autotuner") -> list[tuple[Config, "triton.Config"]]:
    """The configurations that a kernel can be given, each as the table names it and as the kernel has it."""
    return [(config.all_kwargs(), config) for config in kernel.configs]


def use_table(table: TuningTable, kernels: dict[str, "Autotuner"]) -> None:
    """Make kernels take their configurations from a table.

    Kernels without choices, or with one configuration (MAMBA_DETERMINISTIC=1), stay as they are. Choices for another
    key than the kernel's, or of a configuration that it does not have, are left out and logged: the table is then of
    another version of mamba-ssm.

    Args:
        table: The choices.
        kernels: By function name; changed in place.
    """
    levels = itertools.chain([logging.INFO], itertools.repeat(logging.DEBUG))
    stale = []
    for name, kernel in kernels.items():
        if len(kernel.configs) < 2 or name not in table.kernels or isinstance(kernel.cache, _Choices):
            continue
        entry = table.kernels[name]
        known = KernelTable(entry.key)
        if entry.key == tuple(kernel.keys):
            names = [config for config, _ in own_configs(kernel)]
            known.choices = {call: config for call, config in entry.choices.items() if config in names}
        if len(known.choices) < len(entry.choices):
            stale.append(name)
        choices = _Choices(kernel, known, levels)
        kernel.cache = choices
        kernel.run = functools.partial(_run, kernel.run, choices)
    if stale:
        logger.info("choices that do not fit this mamba-ssm were left out for %s (%s)", stale, table.made_with)


class _Choices(dict):
    """The `cache` of an `Autotuner`, key to `triton.Config`, that finds something for keys that it does not hold."""

    def __init__(self, kernel: "Autotuner", table: KernelTable, levels: Iterator[int]):
        self._kernel, self._table, self._levels = kernel, table, levels
        self._refused, self._asked = set(), None
        super().__init__({call.as_triton(): self._config(call) for call in table.choices})
        self.update(kernel.cache)

    def __contains__(self, key: tuple) -> bool:
        # Autotuner.run asks this once a call, and times all configurations if the answer is no
        self._asked = key
        if super().__contains__(key):
            return True
        if key in self._refused:
            return False
        call = CallKey.from_triton(key, len(self._table.key))
        near = self._table.nearest(call)
        if near is None:
            return False
        self[key] = self._config(near)
        logger.log(
            next(self._levels),
            "%s is not tuned for %s: runs as tuned for %s (the first such kernel is logged at INFO, others at DEBUG; "
            "%s=autotune times all configurations instead)",
            self._kernel.base_fn.__name__,
            self._words(call),
            self._words(near),
            SWITCH,
        )
        return True

    def refuse(self) -> bool:
        """Have the call that was asked for last timed after all; False if it already was."""
        key = self._asked
        if key in self._refused or not super().__contains__(key):
            return False
        logger.info("%s does not fit this GPU as tuned: timing its configurations", self._kernel.base_fn.__name__)
        self._refused.add(key)
        del self[key]
        return True

    def _config(self, call: CallKey) -> "triton.Config":
        wanted = self._table.choices[call]
        return next(config for name, config in own_configs(self._kernel) if name == wanted)

    def _words(self, call: CallKey) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in zip(self._table.key, call.values, strict=True))
        return f"{sizes} and {'/'.join(call.dtypes)}"


def _run(run, choices: _Choices, *args, **kwargs):
    """`Autotuner.run` that times the configurations where the chosen one does not compile or launch."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return run(*args, **kwargs)
    except (OutOfResources, CompileTimeAssertionFailure, PTXASError):
        if not choices.refuse():
            raise
    return run(*args, **kwargs)
