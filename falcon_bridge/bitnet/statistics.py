"""What the ternary weights of a model do in training: the share of zeros, how many codes change, the scales.

Codes are looked at where they are used, in the first forward pass of a step: the weights are gathered and quantised
then. What is counted stays on the device until `TernaryStatistics.collect`; the codes of the step before are kept in
2 bits each. Where a CUDA graph captures the forward pass, it captures the counting with it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from falcon_bridge.bitnet.codes import capture_id
from falcon_bridge.bitnet.linear import BitNetColumnParallelLinear, BitNetRowParallelLinear
from falcon_bridge.bitnet.modules import TERNARY_MODULES


BitNetLinear = BitNetColumnParallelLinear | BitNetRowParallelLinear

_SHIFTS = (0, 2, 4, 6)
_LAYER = re.compile(r"^(.*\blayers\.\d+)\.")


@dataclass(frozen=True)
class MatrixStatistics:
    """A Hugging Face matrix, whole, over the steps since the last `TernaryStatistics.collect`.

    Attributes:
        elements: Weights of the matrix.
        zeros: Share of its codes that are 0, in the last step.
        flips: Share of its codes that differ from those of the step before, mean over the steps; None if there was no
            step before.
        scale: What a code of 1 stands for in the last step: the mean of |W|.
    """

    elements: int
    zeros: float
    flips: float | None
    scale: float


def ternary_linears(model: Iterable[torch.nn.Module]) -> dict[str, BitNetLinear]:
    """The BitNet linears of this rank's model chunks.

    Args:
        model: The chunks, as Megatron Bridge hands them to callbacks.

    Returns:
        Linears by ``layers.N.NAME``, with the layer's number in the whole model, from 0, and the name of
        `modules.TERNARY_MODULES`.
    """
    found = {}
    for chunk in model:
        for path, module in chunk.named_modules():
            if not isinstance(module, BitNetLinear):
                continue
            layer = _LAYER.match(path)[1]
            number = chunk.get_submodule(layer).layer_number - 1
            found[f"layers.{number}.{path.rpartition('.')[2]}"] = module
    return found


class TernaryStatistics:
    """Follows the codes of some linears from step to step.

    Args:
        linears: By name, as `ternary_linears` finds them; all of one tensor-parallel group.
    """

    def __init__(self, linears: dict[str, BitNetLinear]) -> None:
        self._followed = {name: _Followed(name, linear) for name, linear in linears.items()}

    def begin_step(self) -> None:
        """To be called before each training step: its first forward pass through each linear counts."""
        for followed in self._followed.values():
            followed.pending = True

    def end_step(self) -> None:
        """To be called after each training step: forward passes of validations do not count."""
        for followed in self._followed.values():
            followed.end_step()

    def collect(self, pipeline_group: dist.ProcessGroup | None = None) -> dict[str, MatrixStatistics]:
        """Statistics of all matrices that have had a step, and a new start for the flips.

        Collective over the tensor-parallel group and `pipeline_group`; waits for the device once.

        Args:
            pipeline_group: Ranks that have the other layers; None if there are none.

        Returns:
            By ``layers.N.NAME`` with Hugging Face's name of the matrix, the same on all ranks.
        """
        followed = [one for one in self._followed.values() if one.has_codes]
        found = _combined(followed) if followed else {}
        if pipeline_group is not None and pipeline_group.size() > 1:
            stages = [None] * pipeline_group.size()
            dist.all_gather_object(stages, found, group=pipeline_group)
            found = {name: statistics for stage in stages for name, statistics in stage.items()}
        return found

    def close(self) -> None:
        """Let go of the linears."""
        for followed in self._followed.values():
            followed.hook.remove()
        self._followed = {}


class _Followed:
    """One linear, this rank's rows of it."""

    def __init__(self, name: str, linear: BitNetLinear) -> None:
        layer, _, module = name.rpartition(".")
        matrices = next((t.hugging_face for t in TERNARY_MODULES if t.megatron == module), (module,))
        self.names = [f"{layer}.{matrix}" for matrix in matrices]
        self.linear, self.pending = linear, False
        self.compared, self._captured = 0, False
        self._codes: torch.Tensor | None = None
        self.hook = linear.register_forward_hook(self._look)

    @property
    def has_codes(self) -> bool:
        return self._codes is not None

    @torch.no_grad()
    def _look(self, linear: BitNetLinear, *_: object) -> None:
        if not self.pending:
            return
        self.pending = False
        codes, self._row_scales = linear.weight_codes()
        if self._codes is None:
            segments = linear.row_segments
            if segments is None:
                segments = torch.zeros(codes.shape[0], dtype=torch.int64)
            self._segments, self._shape = segments.to(codes.device), codes.shape
            self._flips = self._sums(torch.zeros_like(self._segments))
            self._codes = _pack(codes)
        else:
            # in place: a graph goes on reading and writing both
            self._flips += self._sums((codes != self._previous()).sum(dim=1))
            self._codes.copy_(_pack(codes))
            self.compared += 1
        self._captured = bool(capture_id(codes.device))

    def end_step(self) -> None:
        # a replay counts on the device, and calls no hook
        if self.pending and self._captured:
            self.compared += 1
        self.pending = False

    def counts(self) -> torch.Tensor:
        """fp64 `[matrices, 5]`: elements, zeros, flips, and of the rows the scales and their number."""
        rows = torch.ones_like(self._segments)
        zeros = (self._previous() == 0).sum(dim=1)
        scales = torch.zeros(len(self.names), dtype=torch.float64, device=rows.device)
        scales.index_add_(0, self._segments, self._row_scales.double().expand(len(rows)))
        number = self._sums(rows)
        columns = [number * self._shape[1], self._sums(zeros), self._flips, scales, number]
        return torch.stack([column.double() for column in columns], dim=1)

    def start_again(self) -> None:
        self.compared = 0
        self._flips.zero_()

    def _previous(self) -> torch.Tensor:
        return _unpack(self._codes, self._shape)

    def _sums(self, row_values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(self.names), dtype=torch.int64, device=row_values.device)
        return sums.index_add_(0, self._segments, row_values)


def _combined(followed: list[_Followed]) -> dict[str, MatrixStatistics]:
    counts = torch.cat([one.counts() for one in followed])
    group = followed[0].linear.tp_group
    if group is not None and group.size() > 1:
        dist.all_reduce(counts, group=group)
    rows = iter(counts.tolist())
    found = {}
    for one in followed:
        for name in one.names:
            elements, zeros, flips, scales, number = next(rows)
            found[name] = MatrixStatistics(
                elements=round(elements),
                zeros=zeros / elements,
                flips=flips / (elements * one.compared) if one.compared else None,
                scale=number / scales,
            )
        one.start_again()
    return found


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 with four codes each."""
    flat = codes.reshape(-1)
    quarters = torch.nn.functional.pad(flat + 1, (0, -flat.numel() % 4)).view(torch.uint8).view(4, -1)
    packed = quarters[0].clone()
    for shift, quarter in zip(_SHIFTS[1:], quarters[1:], strict=True):
        packed |= quarter << shift
    return packed


def _unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The codes that `_pack` was given."""
    quarters = torch.stack([(packed >> shift) & 3 for shift in _SHIFTS])
    return quarters.view(torch.int8).view(-1)[: shape.numel()].view(shape) - 1
