"""Triton launches at a fraction of their cost on the host.

Triton's own launch of a compiled kernel binds and prints all options, prepares metadata for profilers and validates
descriptors: 26 to 62 µs on a slow host, more than many kernels run. `FastLaunch` finds the compiled kernel by what
Triton specialises it on and hands the arguments to Triton's C launcher.

Not looked at again after a first launch: whether global variables that the kernel reads, or Triton's environment
variables, have changed.
"""

import logging
from functools import cache
from typing import Any

import torch
import triton
from triton.compiler import make_backend
from triton.knobs import runtime
from triton.runtime import JITFunction, driver
from triton.runtime.jit import native_specialize_impl
from triton.tools.tensor_descriptor import TensorDescriptor


logger = logging.getLogger(__name__)

SUPPORTED_TRITON = ("3.6",)
"""Versions whose compiled kernels and launchers are known to take these arguments; others launch in Triton's way."""


class FastLaunch:
    """A Triton kernel with its compile-time constants and options, launched by ``launch(grid, *arguments)``.

    The first launch on each device and for each specialisation of the arguments, by Triton's own rules (dtype and
    alignment of pointers; integers of 1, multiples of 16, more than 32 bits), goes through Triton, which compiles; the
    others run what it compiled. Nothing waits for the device, and the stream is the current one at each launch, so
    that launches can be captured into CUDA graphs. In the interpreter, under Triton's launch hooks (profilers) and
    with a Triton that is not in `SUPPORTED_TRITON`, all launches go through Triton.

    Args:
        kernel: A function under ``triton.jit`` whose constexpr parameters are its last ones.
        **meta: All of its constexpr parameters, and options such as `num_warps`.

    Raises:
        TypeError: The parameters are in another order, or a constexpr is missing.
    """

    def __init__(self, kernel, **meta: Any) -> None:
        self._kernel, self._meta = kernel, meta
        self._compiled: dict[tuple, tuple] = {}
        self._fast = isinstance(kernel, JITFunction) and _supported()
        self._backend = None
        self._constants: tuple = ()
        if isinstance(kernel, JITFunction):
            names = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
            if kernel.arg_names[len(kernel.arg_names) - len(names) :] != names or not meta.keys() >= set(names):
                given = f"give all its constexpr parameters by name ({', '.join(names)}), and declare them last"
                raise TypeError(f"{kernel.__name__}: {given}")
            self._constants = tuple(meta[name] for name in names)

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run the kernel.

        Args:
            grid: Programs in one to three dimensions.
            *arguments: Those of the kernel in front of its constexprs: tensors, numbers, None, tensor descriptors.
        """
        if not self._fast or _hooked():
            self._kernel[grid](*arguments, **self._meta)
            return
        device = torch.cuda.current_device()
        if self._backend is None:
            self._backend = make_backend(driver.active.get_current_target())
        key = (device, *[native_specialize_impl(self._backend, one, False, True, True) for one in arguments])
        compiled = self._compiled.get(key)
        if compiled is None:
            self._remember(key, self._kernel[grid](*arguments, **self._meta))
            return
        launch, function, metadata, cooperative, dependent = compiled
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        none = None
        launch(
            *(x, y, z, stream, function, cooperative, dependent),
            *(none, none, metadata, none, none, none),  # no scratch memory, no hooks and nothing for them
            *arguments,
            *self._constants,
        )

    def _remember(self, key: tuple, kernel) -> None:
        if kernel is None:  # a hook of Triton's took the launch over
            return
        launcher = kernel.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            self._fast = False  # scratch memory is allocated for each launch
            return
        self._compiled[key] = (
            launcher.launch,
            kernel.function,
            kernel.packed_metadata,
            launcher.launch_cooperative_grid,
            launcher.launch_pdl,
        )


class AlignedDescriptor(TensorDescriptor):
    """A `TensorDescriptor` of what is known to be in order, made without a look at it.

    That is: unit stride over the last dimension, and the first element and the other strides at multiples of 16 bytes.
    """

    def __post_init__(self) -> None:
        """Check nothing."""


def stride_unit(*rows: torch.Tensor) -> int:
    """Largest of 8 and 1 that divides the strides of the first two dimensions of all: hand on strides in this unit.

    Told to the compiler, 8 lets a kernel move 16 bytes at once. Triton by itself sees divisibility by 16 only, which
    the width of `in_proj` seldom has.
    """
    return 8 if all(stride % 8 == 0 for row in rows for stride in row.stride()[:2]) else 1


def _hooked() -> bool:
    """Whether a profiler of Triton's wants to hear of launches."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@cache
def _supported() -> bool:
    supported = triton.__version__.startswith(tuple(f"{version}." for version in SUPPORTED_TRITON))
    if not supported:
        logger.warning(
            "Triton %s: kernels launch in Triton's own way, at a higher cost on the host (known: %s)",
            triton.__version__,
            ", ".join(SUPPORTED_TRITON),
        )
    return supported and torch.version.hip is None
