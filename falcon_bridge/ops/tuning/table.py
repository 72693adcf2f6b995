"""A tuning table: for each kernel, which of its configurations was the fastest for which sizes and dtypes.

Such a table is a JSON file. A configuration is named by its meta-parameters and launch options, as
`triton.Config.all_kwargs` gives them; a choice by the values of the kernel's autotuning key and by the dtypes of its
tensor arguments in order, which is what Triton's autotuner tells calls apart by.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from falcon_bridge.errors import UserError


Config = dict[str, int]


class CallKey(NamedTuple):
    """What the autotuner tells calls of one kernel apart by.

    Attributes:
        values: Of the arguments that the kernel is tuned for, such as head_dim and chunk size.
        dtypes: Of the tensor arguments, in order, without "torch.".
    """

    values: tuple[int | bool, ...]
    dtypes: tuple[str, ...]

    @classmethod
    def from_triton(cls, key: tuple, names: int) -> "CallKey":
        """Take apart the key of an autotuner's cache, which begins with the values of `names` arguments."""
        return cls(tuple(key[:names]), tuple(str(dtype).removeprefix("torch.") for dtype in key[names:]))

    def as_triton(self) -> tuple:
        """The key of the autotuner's cache."""
        return (*self.values, *(f"torch.{dtype}" for dtype in self.dtypes))

    def distance(self, other: "CallKey") -> tuple[int, float]:
        """How unlike two calls are: dtypes that only one has, then doublings between their sizes; inf if unrelated."""
        ours, theirs = Counter(self.dtypes), Counter(other.dtypes)
        doublings = 0.0
        for a, b in zip(self.values, other.values, strict=True):
            if isinstance(a, bool) or isinstance(b, bool) or a <= 0 or b <= 0:
                doublings += 0 if a == b else math.inf
            else:
                doublings += abs(math.log2(a / b))
        return ((ours - theirs) + (theirs - ours)).total(), doublings


@dataclass
class KernelTable:
    """The choices of one kernel.

    Attributes:
        key: Names of the arguments that the kernel is tuned for.
        choices: Configuration of each call.
    """

    key: tuple[str, ...]
    choices: dict[CallKey, Config] = field(default_factory=dict)

    def nearest(self, call: CallKey) -> CallKey | None:
        """The call in the table that is the least unlike `call`, the first in sorted order where several are."""
        near = min(sorted(self.choices), key=call.distance, default=None)
        return None if near is None or math.isinf(call.distance(near)[1]) else near


@dataclass
class TuningTable:
    """The choices for one GPU architecture.

    Attributes:
        made_with: GPU and versions that the choices were measured with.
        kernels: By the kernel's function name.
    """

    made_with: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, KernelTable] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "TuningTable":
        """Read what `write` wrote.

        Raises:
            UserError: The file is not there, or not such a table.
        """
        try:
            content = json.loads(path.read_text())
            table = cls(dict(content["made_with"]))
            for name, kernel in content["kernels"].items():
                table.kernels[name] = KernelTable(tuple(kernel["key"]))
                for choice in kernel["choices"]:
                    call = CallKey(tuple(choice["values"]), tuple(choice["dtypes"]))
                    if len(call.values) != len(kernel["key"]):
                        raise ValueError(f"{name} has a choice of {len(call.values)} values for {kernel['key']}")
                    table.kernels[name].choices[call] = dict(choice["config"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a tuning table ({type(error).__name__}: {error}); benchmarks/tune_ssm.py writes one"
            ) from error
        return table

    def write(self, path: Path) -> None:
        """Write the table sorted, a line for each choice; the file is there whole or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text("".join(self._lines()))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _lines(self) -> Iterator[str]:
        yield f'{{\n "made_with": {json.dumps(self.made_with)},\n "kernels": {{'
        for i, (name, kernel) in enumerate(sorted(self.kernels.items())):
            yield f'{"," if i else ""}\n  {json.dumps(name)}: {{\n   "key": {json.dumps(kernel.key)},\n'
            yield '   "choices": ['
            for j, (call, config) in enumerate(sorted(kernel.choices.items())):
                choice = {"values": call.values, "dtypes": call.dtypes, "config": config}
                yield f"{',' if j else ''}\n    {json.dumps(choice)}"
            yield "\n   ]\n  }"
        yield "\n }\n}\n"

    def merge(self, newer: "TuningTable") -> None:
        """Take over all choices of `newer`, also where there is one already."""
        self.made_with.update(newer.made_with)
        for name, kernel in newer.kernels.items():
            ours = self.kernels.setdefault(name, KernelTable(kernel.key))
            if ours.key != kernel.key:
                ours = self.kernels[name] = KernelTable(kernel.key)
            ours.choices.update(kernel.choices)
