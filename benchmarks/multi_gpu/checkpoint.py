"""Checkpoints written on several ranks and read on one, and the reverse: the same bits, and the same losses after."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multi_gpu.cases import Case
from benchmarks.multi_gpu.inputs import a_batch, ensure_checkpoint
from tests.parallel.variant import Variant, identify


STEPS_BEFORE, STEPS_AFTER = 3, 3
MOMENTS = ("exp_avg", "exp_avg_sq")
RESHARDABLE = "fully_reshardable"
ONE = {None: Variant(), RESHARDABLE: Variant(distributed_optimizer=True)}


def several(world_size: int) -> dict[str | None, Variant]:
    """The layouts of several ranks: one with Adam, one with the distributed optimizer."""
    half = world_size // 2
    return {
        None: Variant(tp=2, pp=half, sequence_parallel=True),
        RESHARDABLE: Variant(tp=half, dp=2, sequence_parallel=half > 1, distributed_optimizer=True),
    }


def cases(world_size: int, directory: Path) -> list[Case]:
    """In order: one rank writes, several read that and write, one reads that."""
    hf = directory / "two_groups,_tied"

    def writes(ranks: int, layouts: dict) -> list[Case]:
        return [
            Case(f"written: {_name(layout)}", write, (hf, layout, kind, directory / f"{ranks}-{kind}"), ranks=ranks)
            for kind, layout in layouts.items()
        ]

    def reads(written_on: int, ranks: int, layouts: dict, exact: bool = False) -> list[Case]:
        return [
            Case(
                f"written on {written_on}, read: {_name(layout)}",
                read,
                (hf, layout, kind, directory / f"{written_on}-{kind}", exact),
                ranks=ranks,
            )
            for kind, layout in layouts.items()
        ]

    many = several(world_size)
    return [
        *writes(1, ONE),
        *reads(1, world_size, many),
        *writes(world_size, many),
        *reads(world_size, world_size, many, exact=True),
        *reads(world_size, 1, ONE),
    ]


def _name(layout: Variant) -> str:
    return identify(layout) + ("" if layout.distributed_optimizer else "-adam")


def write(hf: Path, layout: Variant, sharding: str | None, directory: Path) -> dict[str, Any] | None:
    """Train, save, note what is in the checkpoint, and train on."""
    from falcon_bridge.verification.megatron import MegatronUnderTest
    from tests.parallel import states

    first, batch = dist.get_rank() == 0, a_batch(ensure_checkpoint(hf), None)
    model = MegatronUnderTest(hf, layout)
    optimizer = states.make_optimizer(model, distributed=layout.distributed_optimizer)
    before = _train(model, optimizer, batch, STEPS_BEFORE)
    if first:
        directory.mkdir(parents=True)
    dist.barrier()
    states.save(model, optimizer, directory / "checkpoint", sharding)
    state = snapshot(model, optimizer)
    if first:
        torch.save(state, directory / "state.pt")
    after = _train(model, optimizer, batch, STEPS_AFTER)
    model.close()
    if not first:
        return None
    (directory / "losses.json").write_text(json.dumps(after))
    moved = all(moment.count_nonzero() for name, moment in state.items() if name.startswith("exp_avg"))
    return {"ok": moved, "losses": [*before, *after], "error": "" if moved else "a moment was never touched"}


def read(hf: Path, layout: Variant, sharding: str | None, directory: Path, exact: bool) -> dict[str, Any] | None:
    """Load, compare the state bit for bit, and train on; `exact` where the layout is the one that wrote."""
    from falcon_bridge.verification.megatron import MegatronUnderTest
    from tests.parallel import states

    batch = a_batch(ensure_checkpoint(hf), None)
    model = MegatronUnderTest(hf, layout)
    optimizer = states.make_optimizer(model, distributed=layout.distributed_optimizer)
    _load(model, optimizer, directory / "checkpoint", sharding)
    state = snapshot(model, optimizer)
    losses = _train(model, optimizer, batch, STEPS_AFTER)
    model.close()
    if dist.get_rank() != 0:
        return None
    expected = torch.load(directory / "state.pt", weights_only=True)
    wrong = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in expected or name not in state or not torch.equal(expected[name], state[name])
    )
    curve = json.loads((directory / "losses.json").read_text())
    worst = max(abs(a - b) for a, b in zip(curve, losses, strict=True))
    error = f"{len(wrong)} of {len(expected)} tensors differ: {', '.join(wrong[:3])}" if wrong else ""
    if not worst <= (1e-5 if exact else 1e-3):
        error = error or f"the losses after it are up to {worst:.2g} off"
    return {"ok": not error, "tensors": len(expected), "loss": worst, "losses": losses, "error": error}


def _load(model, optimizer, directory: Path, sharding: str | None) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from tests.parallel import states

    wanted = states._sharded(model, optimizer, sharding, loading=True)
    loaded = dist_checkpointing.load(wanted, str(directory))
    chunks = unwrap_model(model.chunks)
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    for name, chunk in zip(names, chunks, strict=True):
        # Transformer Engine's modules have state of their own, of which the checkpoint need not hold any: what was
        # not loaded shows when the state is compared
        chunk.load_state_dict(loaded[name], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])


def _train(model, optimizer, batch, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(model.loss(batch, backward=True))
        optimizer.step()
    return losses


def snapshot(model, optimizer) -> dict[str, torch.Tensor]:
    """Weights and both moments, whole and by Hugging Face name, and the step count; fp32 models only."""
    parameters = [p for chunk in model.chunks for p in chunk.parameters() if p.requires_grad]
    weights = [p.data for p in parameters]
    state = {f"weight {name}": tensor.clone() for name, tensor in model.export()}
    for moment in MOMENTS:
        whole = [_whole(optimizer, parameter, moment) for parameter in parameters]
        try:
            for parameter, tensor in zip(parameters, whole, strict=True):
                parameter.data = tensor
            state |= {f"{moment} {name}": tensor.clone() for name, tensor in model.export()}
        finally:
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.data = weight
    return {**state, "step": torch.tensor(_steps(optimizer))}


def _whole(optimizer, parameter, moment: str) -> torch.Tensor:
    from megatron.core.optimizer import DistributedOptimizer

    (part,) = optimizer.chained_optimizers
    if not isinstance(part, DistributedOptimizer):
        return part.optimizer.state[parameter][moment].clone()
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    if parameter in part.model_param_gbuf_map:  # of which this rank holds a part
        own = part._get_model_param_range_map(parameter)["param"]
        whole[own.start : own.end] = part._get_main_param_and_optimizer_states(parameter)[moment]
    dist.all_reduce(whole, group=part.data_parallel_group)
    return whole.view_as(parameter)


def _steps(optimizer) -> list[float]:
    """Adam's step counts: torch keeps one with each parameter, Transformer Engine one with each group."""
    (part,) = optimizer.chained_optimizers
    counts = [group["step"] for group in part.optimizer.param_groups if "step" in group]
    counts += [state["step"] for state in part.optimizer.state.values() if "step" in state]
    return sorted({float(count) for count in counts})
