"""The sum of a model and its adapters, as a Megatron checkpoint or a Hugging Face one."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_bridge.conversion.adapters import AdapterCheckpoint, find_adapters, load_shards, prepare_provider
from falcon_bridge.conversion.atomic import atomic_directory, check_target, is_inside
from falcon_bridge.conversion.exporter import ExportResult, export_checkpoint
from falcon_bridge.conversion.hf_checkpoint import check_checkpoint
from falcon_bridge.conversion.importer import Progress
from falcon_bridge.conversion.megatron_checkpoint import (
    copy_hf_source,
    find_megatron_checkpoint,
    is_megatron_checkpoint,
    reading_shards,
)
from falcon_bridge.errors import UserError
from falcon_bridge.ranks import run_ranks


if TYPE_CHECKING:
    from falcon_bridge.verification.layout import ParallelLayout


def merge_adapter(
    megatron: str | Path,
    target: str | Path,
    layout: "ParallelLayout",
    *,
    base: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write the sum of a model and its adapters as a Megatron checkpoint like any other, to export or train on.

    Args:
        megatron: the PEFT run's checkpoint directory, or one ``iter_*`` of it.
        target: the Megatron checkpoint directory to make; it appears whole or not at all.
        layout: ranks to merge on; it need not be the layout of the training.
        base: the model's checkpoint, where it is no longer where the run found it.
        force: replace `target`.

    Returns:
        `target`.

    Raises:
        UserError: the checkpoint, the target or the layout cannot be used.
        JobError: the merging failed.
    """
    from falcon_bridge.conversion.runtime import preload

    check_target(target, force=force)
    preload()
    adapters = find_adapters(megatron, base)
    if is_inside(target, adapters.checkpoint.iteration_dir) or is_inside(target, adapters.base):
        raise UserError(f"{target} is inside a checkpoint that is read: choose another output directory")
    with atomic_directory(target, force=force) as partial:
        run_ranks(_merge_on_rank, layout.world_size, megatron, base, partial, layout)
        if adapters.checkpoint.hf_source is not None:
            copy_hf_source(adapters.checkpoint.hf_source, partial)
    return Path(target)


def export_merged(
    megatron: str | Path,
    target: str | Path,
    layout: "ParallelLayout",
    *,
    base: str | Path | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> ExportResult:
    """Write the sum of a model and its adapters as a Hugging Face directory that stock transformers loads.

    The merged Megatron checkpoint lies beside `target` while this runs.

    Args:
        megatron: the PEFT run's checkpoint directory, or one ``iter_*`` of it.
        target: the directory to make; it appears whole or not at all.
        layout: ranks to merge and convert on.
        base: the model's checkpoint, where it is no longer where the run found it.
        force: replace `target`.
        allow_nonfinite: export NaN, infinite and absurdly large weights.
        progress: called with a stage's name, steps done and steps in all.

    Returns:
        What was written.

    Raises:
        UserError: the checkpoint, the target or the layout cannot be used.
        JobError: the merging or the conversion failed.
    """
    target = Path(target).absolute()
    check_target(target, force=force)
    find_adapters(megatron, base)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".merging", dir=target.parent) as directory:
        merged = merge_adapter(megatron, Path(directory) / "megatron", layout, base=base)
        return export_checkpoint(
            merged, target, layout, force=force, allow_nonfinite=allow_nonfinite, progress=progress
        )


def _merge_on_rank(megatron: Path, base: Path | None, target: Path, layout: "ParallelLayout") -> None:
    import torch.distributed as dist
    from megatron.bridge.training.model_load_save import save_megatron_model

    from falcon_bridge.conversion.runtime import conversion_rank
    from falcon_bridge.peft import merge_adapters

    with conversion_rank() as device:
        adapters = find_adapters(megatron, base)
        prepare_provider(adapters.provider, layout)
        model = adapters.peft(_base_model(adapters, on_cpu=device.type == "cpu"), training=False)
        load_shards(model, adapters.checkpoint.iteration_dir, lambda name: ".adapter." in name)
        merge_adapters(model)
        source = adapters.checkpoint.hf_source
        tokenizer = source if source is not None and (source / "tokenizer_config.json").is_file() else None
        save_megatron_model(model, target, hf_tokenizer_path=tokenizer)
        dist.barrier()


def _base_model(adapters: AdapterCheckpoint, *, on_cpu: bool) -> list[Any]:
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import build_and_load_model

    if is_megatron_checkpoint(adapters.base):
        iteration_dir = find_megatron_checkpoint(adapters.base).iteration_dir
        with reading_shards(iteration_dir):
            model = build_and_load_model(
                str(iteration_dir), adapters.provider, use_cpu_init=on_cpu, skip_temp_dist_context=True
            )
        return model if isinstance(model, list) else [model]
    bridge = AutoBridge.from_hf_pretrained(check_checkpoint(adapters.base, values=False).path)
    model = adapters.provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=on_cpu, data_parallel_random_init=False
    )
    bridge.load_hf_weights(model)
    return model
