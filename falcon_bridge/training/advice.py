"""What to change in a configuration so that it fits a GPU, found by estimating the changes."""

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from falcon_bridge.errors import UserError
from falcon_bridge.training.memory import estimate_memory


_GATES = {"model.recompute_gates": True}
_MIXER = {"model.recompute_mixer": True}
_MIXER_MLP = {**_MIXER, "model.recompute_granularity": "selective", "model.recompute_modules": ["mlp"]}
_FULL = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
_MAX_GPUS = 4096


def peak_memory(cfg: Any, world_size: int) -> int:
    """Bytes on the rank that needs most.

    Args:
        cfg: a ``ConfigContainer`` whose provider is finalized.
        world_size: number of ranks.
    """
    return max(stage.peak for stage in estimate_memory(cfg, world_size))


def fewest_gpus(cfg: Any, limit: int) -> int | None:
    """The fewest GPUs, among the layout's size times powers of two, on which `cfg` fits; None if there are none.

    More ranks share the optimizer, and nothing else.

    Args:
        cfg: a ``ConfigContainer`` whose provider is finalized.
        limit: bytes a rank's tensors may take.
    """
    ranks = layout = _layout_size(cfg.model)
    while ranks <= _MAX_GPUS and _shares_batch(cfg, ranks // layout):
        if peak_memory(cfg, ranks) <= limit:
            return ranks
        ranks *= 2
    return None


def advice(cfg: Any, world_size: int, limit: int) -> list[tuple[str, int, int]]:
    """Changes with which a configuration that does not fit does, the least costly first.

    Args:
        cfg: a ``ConfigContainer`` whose provider is finalized; not changed.
        world_size: number of ranks.
        limit: bytes a rank's tensors may take.

    Returns:
        At most three: overrides as on the command line, the number of GPUs, bytes at the peak.
    """
    found = []
    for changes in _candidates(cfg):
        changed = _changed(cfg, changes)
        ranks = math.lcm(world_size, _layout_size(changed.model))
        if not _valid(changed, ranks):
            continue
        peak = peak_memory(changed, ranks)
        if peak <= limit:
            found.append((" ".join(f"{key}={_text(value)}" for key, value in changes.items()), ranks, peak))
        if len(found) == 3:
            break
    more = fewest_gpus(cfg, limit)
    if len(found) < 3 and more is not None and more > world_size:
        found.append(("", more, peak_memory(cfg, more)))
    return found


def _candidates(cfg: Any) -> Iterator[dict[str, Any]]:
    model, rows = cfg.model, cfg.train.micro_batch_size
    recomputes = _recomputes(model)
    batches = [{"train.micro_batch_size": rows // divisor} for divisor in (2, 4, 8, 16) if rows % divisor == 0]
    tensor = [
        {"model.tensor_model_parallel_size": model.tensor_model_parallel_size * n, "model.sequence_parallel": True}
        for n in (2, 4, 8)
    ]
    # documents that end anywhere need split heads, which Falcon-H1 has
    apart = getattr(cfg.dataset, "inter_document_masking", False) and hasattr(model, "d_ssm")
    split = {"model.cp_comm_type": "a2a"} if apart and model.cp_comm_type != "a2a" else {}
    context = [{"model.context_parallel_size": (model.context_parallel_size or 1) * n, **split} for n in (2, 4, 8)]
    pipeline = [{"model.pipeline_model_parallel_size": model.pipeline_model_parallel_size * n} for n in (2, 4, 8)]
    yield from recomputes
    yield from batches
    for batch in batches[-1:] or [{}]:
        yield from ({**batch, **recompute} for recompute in recomputes if batch)
        for parallel in (*tensor, *context, *pipeline):
            yield {**batch, **parallel}
            if recomputes:
                yield {**batch, **parallel, **recomputes[-1]}


def _recomputes(model: Any) -> list[dict[str, Any]]:
    if model.recompute_granularity == "full":
        return []
    full = dict(_FULL)
    if model.recompute_modules not in (None, ["core_attn"]):  # Megatron's default
        full["model.recompute_modules"] = None
    if not hasattr(model, "recompute_mixer"):
        return [full]
    if model.recompute_mixer:
        full["model.recompute_mixer"] = False
    if model.recompute_gates:
        full["model.recompute_gates"] = False
    dense = not (model.use_bitnet or model.fp8)
    mixer_mlp = {**_MIXER_MLP, "model.recompute_gates": False} if model.recompute_gates else _MIXER_MLP
    return [*([_GATES] if dense else []), _MIXER, mixer_mlp, full]


def _changed(cfg: Any, changes: dict[str, Any]) -> SimpleNamespace:
    sections = {name: copy.copy(getattr(cfg, name)) for name in ("model", "train", "dataset")}
    for key, value in changes.items():
        section, _, field = key.partition(".")
        setattr(sections[section], field, value)
    kept = {name: getattr(cfg, name) for name in ("ddp", "optimizer", "peft", "mixed_precision", "validation")}
    return SimpleNamespace(**sections, **kept)


def _valid(cfg: Any, ranks: int) -> bool:
    from falcon_bridge.models.falcon_h1.validation import check_supported
    from falcon_bridge.training.documents import check_documents

    try:
        if hasattr(cfg.dataset, "inter_document_masking"):
            check_documents(cfg)
        if hasattr(cfg.model, "resolve_layer_pattern"):
            check_supported(cfg.model)
        elif cfg.model.num_layers % cfg.model.pipeline_model_parallel_size:
            return False
    except (ValueError, UserError):
        return False
    return _shares_batch(cfg, ranks // _layout_size(cfg.model))


def _shares_batch(cfg: Any, replicas: int) -> bool:
    return cfg.train.global_batch_size % (cfg.train.micro_batch_size * replicas) == 0


def _layout_size(model: Any) -> int:
    parallel = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    return parallel * (model.context_parallel_size or 1)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return str(value).replace("'", "").replace(" ", "")
