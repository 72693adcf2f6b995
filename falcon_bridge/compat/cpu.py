"""Run Megatron Core and Megatron Bridge on a machine without CUDA, over gloo.

Both name the CUDA device literally in well over a hundred places. Those are not patched one by one: :data:`ENTRIES`
lists what they expect of CUDA and how a CPU answers. Some are rules of one ``TorchFunctionMode`` that says what
"cuda" means in a torch call, others replace a function while the context is open. ``torch.cuda.is_available()`` and
``device_count()`` keep telling the truth, so every library's own CPU branch still works.
"""

import contextlib
import pkgutil
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from falcon_bridge.compat import cpu_random
from falcon_bridge.compat.upstream import PRIVATE


CPU = torch.device("cpu")


class Stream:
    """The one CPU stream: in order, and done with everything it was given."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: object) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _to_cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and _is_cuda(args[0]):
        args = (CPU, *args[1:])
    return tensor.to(*args, **kwargs)


def _cuda_type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> str | torch.Tensor:
    named = tensor.type(*args, **kwargs)
    return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) else named


class Call(NamedTuple):
    """A torch function that is answered by another one."""

    function: Callable[..., Any]
    answer: Callable[..., Any]


class Keyword(NamedTuple):
    """A keyword argument of any torch function that is rewritten."""

    name: str
    rewrite: Callable[[Any], Any]


class Replacement(NamedTuple):
    """An attribute, ``module:name`` or ``module:Class.name``, that is another function while the context is open."""

    path: str
    make: Callable[[Any], Any]


class Context(NamedTuple):
    """Another context manager that is open as long."""

    open: Callable[[], AbstractContextManager[Any]]


class Entry(NamedTuple):
    """One thing that upstream expects of CUDA, and what happens instead."""

    why: str
    what: Call | Keyword | Replacement | Context


def _always(answer: Any) -> Callable[[Any], Callable[..., Any]]:
    """A replacement that ignores the function it replaces and all arguments."""
    return lambda original: lambda *args, **kwargs: answer


def _allow_no_cuda(initialize_megatron: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: initialize_megatron(*args, **{**kwargs, "allow_no_cuda": True})


def _gloo_for_nccl(init_process_group: Callable[..., Any]) -> Callable[..., Any]:
    def init_over_gloo(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return init_process_group("gloo" if backend == "nccl" else backend, *args, **kwargs)

    return init_over_gloo


ENTRIES: dict[str, Entry] = {
    "device=": Entry(
        "device='cuda' and a device index in factory functions, everywhere",
        Keyword("device", lambda device: CPU if _is_cuda(device) else device),
    ),
    "pin_memory=": Entry(
        "context parallelism's index tensors (models/common/embeddings/rope_utils.py), inference contexts",
        Keyword("pin_memory", lambda pin_memory: False),
    ),
    "Tensor.to": Entry(
        "tensor.to('cuda') and module.to(device) with the device as first argument", Call(torch.Tensor.to, _to_cpu)
    ),
    "Tensor.cuda": Entry(
        "tensor.cuda() and module.cuda(), e.g. bridge/models/model_provider.py, bridge/training/gpt_step.py",
        Call(torch.Tensor.cuda, lambda tensor, *args, **kwargs: tensor),
    ),
    "Tensor.pin_memory": Entry(
        "inference contexts, CPU offloading", Call(torch.Tensor.pin_memory, lambda tensor, *args, **kwargs: tensor)
    ),
    "Tensor.type": Entry(
        "compared with 'torch.cuda.FloatTensor' in optimizer.py, distrib_optimizer.py and clip_grads.py",
        Call(torch.Tensor.type, _cuda_type_name),
    ),
    "current_device": Entry(
        "tensor_parallel/layers.py, rotary_pos_embedding.py, p2p_communication.py and 200 other places",
        Replacement("torch.cuda:current_device", _always(CPU)),
    ),
    "set_device": Entry(
        "bridge/models/model_provider.py, before it makes its own process group",
        Replacement("torch.cuda:set_device", _always(None)),
    ),
    "synchronize": Entry(
        "core/timers.py, p2p_communication.py, dist_checkpointing",
        Replacement("torch.cuda:synchronize", _always(None)),
    ),
    "Stream": Entry("DDP is wrapped on a side stream", Replacement("torch.cuda:Stream", lambda original: Stream)),
    "current_stream": Entry(
        "the same side stream waits for it", Replacement("torch.cuda:current_stream", _always(Stream()))
    ),
    "init_process_group": Entry(
        "bridge/models/model_provider.py and model_load_save.py name nccl literally",
        Replacement("torch.distributed:init_process_group", _gloo_for_nccl),
    ),
    "initialize_megatron": Entry(
        "asserts CUDA unless told otherwise, which setup() has no argument for",
        Replacement(PRIVATE["setup.initialize_megatron"].path, _allow_no_cuda),
    ),
    "get_rng_state": Entry(
        "checkpoints and the RNG streams' add()",
        Replacement("torch.cuda:get_rng_state", lambda original: cpu_random.get_rng_state),
    ),
    "set_rng_state": Entry(
        "restoring a checkpoint", Replacement("torch.cuda:set_rng_state", lambda original: cpu_random.set_rng_state)
    ),
    "manual_seed": Entry(
        "model_parallel_cuda_manual_seed() and the RNG streams' add()",
        Replacement("torch.cuda:manual_seed", lambda original: cpu_random.manual_seed),
    ),
    "_get_cuda_rng_state": Entry(
        "the RNG streams' fork() and activation recomputation",
        Replacement(PRIVATE["_get_cuda_rng_state"].path, lambda original: cpu_random.get_rng_state),
    ),
    "_set_cuda_rng_state": Entry(
        "the same", Replacement(PRIVATE["_set_cuda_rng_state"].path, lambda original: cpu_random.set_rng_state)
    ),
    "fork_warning": Entry(
        "fork() warns whenever the CPU's generator moved inside it, which is the very purpose here",
        Context(cpu_random.without_fork_warning),
    ),
    "_set_random_seed": Entry(
        "seeds the RNG streams only if torch counts a GPU",
        Replacement(PRIVATE["initialize._set_random_seed"].path, cpu_random.also_seed_streams),
    ),
    "temporary_distributed_context": Entry(
        "the same, for a conversion in a process without process groups",
        Replacement(PRIVATE["temporary_distributed_context"].path, cpu_random.also_seed_streams_of_conversion),
    ),
    "DataLoader": Entry(
        "starting a DataLoader draws a seed from the CPU generator, on a GPU not the one of dropout: a resumed "
        "run starts it after the restored states, so its dropout would differ from that of a run without a stop",
        Replacement(PRIVATE["DataLoader"].path, cpu_random.beside_the_models_stream),
    ),
    "eager": Entry(
        "fusions are compiled when their modules are imported; Inductor takes 45 s to compile them for a CPU",
        Context(lambda: torch.compiler.set_stance("force_eager")),
    ),
}


class CudaMeansCpu(TorchFunctionMode):
    """Answers torch calls by the :class:`Call` and :class:`Keyword` rules it is given."""

    def __init__(self, rules: Collection[Call | Keyword]) -> None:
        super().__init__()
        self.answers = {rule.function: rule.answer for rule in rules if isinstance(rule, Call)}
        self.keywords = [rule for rule in rules if isinstance(rule, Keyword)]

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for name, rewrite in self.keywords:
            if name in kwargs:
                kwargs = {**kwargs, name: rewrite(kwargs[name])}
        return self.answers.get(func, func)(*args, **kwargs)


def _open(replacement: Replacement) -> AbstractContextManager[Any]:
    owner, _, name = replacement.path.replace(":", ".", 1).rpartition(".")
    owner = pkgutil.resolve_name(owner)
    return mock.patch.object(owner, name, replacement.make(getattr(owner, name)))


_is_active = False


@contextlib.contextmanager
def cpu_runtime(*, without: Collection[str] = ()) -> Iterator[None]:
    """Run Megatron Core and Megatron Bridge on the CPU inside this context.

    Does nothing where CUDA is available, and nothing more inside an open ``cpu_runtime()``. Everything is undone on
    exit, also after an exception. A training config still has to ask for ``dist.distributed_backend="gloo"``, which
    Bridge checks itself. For one thread at a time.

    Args:
        without: names in :data:`ENTRIES` to leave out, to see what each is for.

    Raises:
        ValueError: ``without`` names what :data:`ENTRIES` does not have, or is given inside an open ``cpu_runtime()``.
    """
    global _is_active
    unknown = sorted(set(without) - set(ENTRIES))
    if unknown:
        raise ValueError(f"cpu_runtime has no entry {', '.join(unknown)}; there are {', '.join(ENTRIES)}")
    if torch.cuda.is_available():
        yield
        return
    if _is_active:
        if without:
            raise ValueError("cpu_runtime(without=...) cannot take effect inside an open cpu_runtime()")
        yield
        return

    chosen = [entry.what for name, entry in ENTRIES.items() if name not in without]
    with contextlib.ExitStack() as stack:
        _is_active = True
        stack.callback(_deactivate)
        for what in chosen:
            if isinstance(what, Replacement):
                stack.enter_context(_open(what))
            elif isinstance(what, Context):
                stack.enter_context(what.open())
        stack.enter_context(CudaMeansCpu([what for what in chosen if isinstance(what, Call | Keyword)]))
        yield


def _deactivate() -> None:
    global _is_active
    _is_active = False
