"""The upstream internals that falcon_bridge leans on, by name, in one place.

Everything here is private to Megatron Core, Megatron Bridge or transformers (an underscore name, or an attribute that
we replace), so a minor release may move it. ``tests/unit/compat/test_upstream.py`` resolves the whole table and says
which name moved; our own modules take the names from here through :func:`upstream`.
"""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Private(NamedTuple):
    """One private name: where it lives, as ``module:attribute.path``, and what we use it for."""

    path: str
    why: str


PRIVATE: dict[str, Private] = {
    "compile_helpers": Private(
        "megatron.core.datasets.utils:compile_helpers",
        "runs make in the installed package; replaced where the wheel ships the built helper but no Makefile",
    ),
    "initialize.compile_helpers": Private(
        "megatron.bridge.training.initialize:compile_helpers", "the same function, bound by name at import"
    ),
    "initialize._set_random_seed": Private(
        "megatron.bridge.training.initialize:_set_random_seed",
        "seeds Megatron's RNG streams only where torch counts a GPU; cpu_runtime seeds them too",
    ),
    "setup.initialize_megatron": Private(
        "megatron.bridge.training.setup:initialize_megatron",
        "has allow_no_cuda, which setup() does not pass on; cpu_runtime does",
    ),
    "temporary_distributed_context": Private(
        "megatron.bridge.training.model_load_save:temporary_distributed_context",
        "seeds the RNG streams of a conversion only where there is a GPU; cpu_runtime seeds them too",
    ),
    "mamba_mixer.HAVE_MAMBA_SSM": Private(
        "megatron.core.ssm.mamba_mixer:HAVE_MAMBA_SSM",
        "MambaMixer.__init__ refuses to run where it is false; true while ours is built (compat/mamba.py)",
    ),
    "DataLoader": Private(
        "torch.utils.data.dataloader:_BaseDataLoaderIter.__init__",
        "draws a seed from the default CPU generator; beside the model's stream in cpu_runtime",
    ),
    "_get_cuda_rng_state": Private(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state", "read by the RNG streams; the CPU's in cpu_runtime"
    ),
    "_set_cuda_rng_state": Private(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state", "set by the RNG streams; the CPU's in cpu_runtime"
    ),
}


def resolve(path: str) -> Any:
    """Import what ``module:attribute.path`` names.

    Raises:
        ImportError: the module or the attribute is not there; the message has both names.
    """
    module, _, attributes = path.partition(":")
    try:
        return pkgutil.resolve_name(path)
    except AttributeError:
        raise ImportError(f"{module} has no {attributes}: it moved or was renamed upstream") from None


def upstream(name: str) -> Any:
    """The private upstream object that :data:`PRIVATE` lists as ``name``.

    Raises:
        ImportError: upstream moved it; the message says what it was used for.
    """
    private = PRIVATE[name]
    try:
        return resolve(private.path)
    except ImportError as error:
        raise ImportError(f"{private.path} ({private.why}) cannot be imported: {error}") from error


def patch_missing_helpers_makefile() -> bool:
    """Keep Megatron from running ``make`` in an installed package that has nothing left to make.

    ``initialize_megatron`` compiles the C++ dataset helpers with ``make`` and exits if that fails. The megatron-core
    wheel ships them built but leaves the Makefile out, so every ``pretrain()`` from a wheel would exit, with or without
    a GPU. Where the Makefile is there (a source checkout) or the built helper is not, nothing is changed. Megatron
    Bridge's training modules are not imported by this.

    Returns:
        Whether ``compile_helpers`` is now a function that does nothing.
    """
    utils = importlib.import_module(PRIVATE["compile_helpers"].path.partition(":")[0])
    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if not built or Path(utils.__file__).with_name("Makefile").exists():
        return False

    importers = [utils]
    initialize = PRIVATE["initialize.compile_helpers"].path.partition(":")[0]
    if initialize in sys.modules:
        importers.append(sys.modules[initialize])
    for module in importers:
        module.compile_helpers = helpers_are_compiled
    return True


def helpers_are_compiled() -> None:
    """Stands in for ``compile_helpers`` where the dataset helpers are already built: nothing to do."""
