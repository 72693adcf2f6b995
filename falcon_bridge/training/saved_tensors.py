"""What a forward pass keeps for the backward pass, by module: what the memory estimate is checked against."""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in autograd's graph.

    Attributes:
        module: name of the innermost module whose forward saved it; "" is the model itself.
        shape: of the tensor.
        dtype: of the tensor.
        storage_bytes: of the storage that it keeps alive, which may be larger than the tensor.
        new: whether this is the first tensor to keep that storage.
    """

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage_bytes: int
    new: bool


@dataclass
class SavedTensors:
    """Context manager that records what the forward pass of `model` saves.

    The tensors themselves are untouched, so a backward pass may follow. Storages of parameters and buffers are not
    recorded.

    Args:
        model: a whole model, or a wrapper around one.
    """

    model: nn.Module
    tensors: list[SavedTensor] = field(default_factory=list)

    def __enter__(self) -> "SavedTensors":
        self._stack, self._handles, self._seen = [""], [], set()
        # Megatron's wrapper keeps its gradient buffers in an attribute called `buffers`
        owned = (*nn.Module.parameters(self.model), *nn.Module.buffers(self.model))
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in owned}
        for name, module in self.model.named_modules():
            # wrappers (distributed data parallel, Float16Module) are not part of the name
            name = re.sub(r"^(module\.)+", "", f"{name}.").rstrip(".")
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, *_) -> None:
        self._stack.append(name)

    def _leave(self, *_) -> None:
        self._stack.pop()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self._kept:
            new = storage.data_ptr() not in self._seen
            self._seen.add(storage.data_ptr())
            self.tensors.append(SavedTensor(self._stack[-1], tuple(tensor.shape), tensor.dtype, storage.nbytes(), new))
        return tensor

    @property
    def total(self) -> int:
        """Bytes of all distinct storages."""
        return sum(tensor.storage_bytes for tensor in self.tensors if tensor.new)

    def by_module(self) -> dict[str, int]:
        """Bytes of distinct storages by module, those of layers added up under ``layers.*``."""
        sums = Counter()
        for tensor in self.tensors:
            if tensor.new:
                sums[re.sub(r"\blayers\.\d+", "layers.*", tensor.module)] += tensor.storage_bytes
        return dict(sums)
