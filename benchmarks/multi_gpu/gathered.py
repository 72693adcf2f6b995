"""Bytes that a tensor-parallel rank receives from the others in all-gathers, counted where they are dispatched."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


GATHERS = (torch.ops.c10d._allgather_base_, torch.ops.c10d.allgather_, torch.ops.c10d.allgather_into_tensor_coalesced_)
OTHERS = "others"


@dataclass
class GatheredBytes:
    """What was received, in bytes.

    Attributes:
        forward: in forward passes, by the last component of the name of the module that gathered; `OTHERS` for those
            that were not named.
        backward: in the backward pass.
    """

    forward: dict[str, int] = field(default_factory=dict)
    backward: int = 0


@contextmanager
def count_gathered_bytes(chunks: list[torch.nn.Module], names: tuple[str, ...]) -> Iterator[GatheredBytes]:
    """Count while the block runs, whoever calls: Megatron, Transformer Engine or a BitNet linear.

    A rank's own share does not count, so groups of one rank add nothing.

    Args:
        chunks: model chunks.
        names: last components of the modules to tell apart in the forward pass; none within another.

    Yields:
        The counts so far.
    """
    counted = GatheredBytes()
    inside: list[str] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in GATHERS:
                received, own = (
                    sum(t.numel() * t.element_size() for t in tree_leaves(tensors)) for tensors in args[:2]
                )
                if torch._C._current_graph_task_id() >= 0:  # within autograd's backward pass
                    counted.backward += received - own
                else:
                    name = inside[-1] if inside else OTHERS
                    counted.forward[name] = counted.forward.get(name, 0) + received - own
            return func(*args, **(kwargs or {}))

    hooks = []
    for chunk in chunks:
        for path, module in chunk.named_modules():
            name = path.rpartition(".")[2]
            if name in names:
                hooks.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
                hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        with Counter():
            yield counted
    finally:
        for hook in hooks:
            hook.remove()
