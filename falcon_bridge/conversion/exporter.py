"""Megatron → Hugging Face."""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_bridge.conversion.atomic import atomic_directory, check_target, is_inside
from falcon_bridge.conversion.checksums import write_checksums
from falcon_bridge.conversion.export_format import ExportFormat, check_format
from falcon_bridge.conversion.hf_checkpoint import check_checkpoint, expected_shapes
from falcon_bridge.conversion.hf_config import LLAMA
from falcon_bridge.conversion.importer import Progress, check_layout
from falcon_bridge.conversion.megatron_checkpoint import (
    MegatronCheckpoint,
    find_megatron_checkpoint,
    reading_shards,
    source_dtypes,
    source_files,
    source_form,
)
from falcon_bridge.conversion.shards import MAX_SHARD_BYTES, write_shards
from falcon_bridge.errors import JobError, UserError, one_line
from falcon_bridge.ranks import emit, run_ranks


if TYPE_CHECKING:
    from falcon_bridge.conversion.families import Family
    from falcon_bridge.verification.layout import ParallelLayout

_OVERHEAD_BYTES = 16 * 2**20
_NBYTES = {"F32": 4, "BF16": 2}


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        path: the Hugging Face checkpoint directory.
        tensors: number of tensors.
        nbytes: their size.
        iteration: of the Megatron checkpoint.
        config_from: ``"hf_source"`` where config.json was kept from the import, ``"provider"`` where it was built.
        form: of ternary weights, a value of `models.falcon_edge.weights.Form`; None where there are none.
    """

    path: Path
    tensors: int
    nbytes: int
    iteration: int
    config_from: str
    form: str | None = None


def export_checkpoint(
    megatron: str | Path,
    target: str | Path,
    layout: "ParallelLayout",
    *,
    format: str = "hf",
    force: bool = False,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda stage, done, total: None,
) -> ExportResult:
    """Convert a Megatron checkpoint to a Hugging Face directory that stock transformers loads.

    config.json, tokenizer and dtypes are those of the checkpoint that was imported, where the Megatron directory keeps
    them (``hf_source/``); for a model trained from scratch config.json is built from its provider. The result is
    checked like any source before it appears, and has SHA-256 sums beside its files.

    Args:
        megatron: checkpoint directory, or one ``iter_*`` of it.
        target: the directory to make; it appears whole or not at all.
        layout: ranks to convert on; it need not be the layout of the training.
        format: one of `export_format.FORMATS`: how the weights of a ternary model are written. "hf" is the form of the
            checkpoint that was imported, latent weights where none was.
        force: replace `target`.
        allow_nonfinite: export NaN, infinite and absurdly large weights.
        max_shard_bytes: largest safetensors file.
        progress: called with a stage's name, steps done and steps in all.

    Raises:
        UserError: the checkpoint, the target or the layout cannot be used.
        JobError: the conversion failed, or its result does not pass the checks.
    """
    from falcon_bridge.conversion.runtime import preload

    check_format(format)
    check_target(target, force=force)
    source = find_megatron_checkpoint(megatron)
    if is_inside(source.root, target):
        raise UserError(f"{target} holds the checkpoint {source.root}: choose another output directory")
    if any(is_inside(target, part) for part in (source.iteration_dir, source.hf_source) if part):
        raise UserError(f"{target} is inside the checkpoint {source.root}: choose another output directory")
    preload()
    with _config_directory(source) as (config_dir, provider):
        check_layout(config_dir, layout)
        written = _format(format, provider, source)
        shapes = written.shapes(expected_shapes(config_dir))
        nbytes = sum(math.prod(shape) for shape in shapes.values()) * _NBYTES[written.dtype]
        with atomic_directory(target, force=force, bytes_needed=nbytes + _OVERHEAD_BYTES) as partial:
            sizes = run_ranks(
                _export_on_rank,
                layout.world_size,
                config_dir,
                source.iteration_dir,
                partial,
                layout,
                written,
                list(shapes),
                max_shard_bytes,
                on_event=lambda rank, event: progress(*event),
            )[0]
            for file in source_files(config_dir):
                shutil.copyfile(file, partial / file.name)
            config = written.config(json.loads((partial / "config.json").read_text()))
            if config is not None:
                (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            _check_result(partial, allow_nonfinite, progress, len(sizes))
            write_checksums(partial)
    config_from = "hf_source" if source.hf_source else "provider"
    form = written.form if written.ternary else None
    return ExportResult(Path(target), len(sizes), sum(sizes.values()), source.iteration, config_from, form)


def _format(name: str, provider: Any, source: MegatronCheckpoint) -> ExportFormat:
    import torch

    from falcon_bridge.conversion.families import family_of

    return ExportFormat(
        name,
        architecture=family_of(provider).architecture,
        ternary=provider.use_bitnet,
        dtype="BF16" if provider.bf16 or provider.params_dtype == torch.bfloat16 else "F32",
        source_form=source_form(source.hf_source),
        source_dtypes=source_dtypes(source.hf_source),
    )


def _check_result(directory: Path, allow_nonfinite: bool, progress: Progress, total: int) -> None:
    done = 0

    def count(name: str) -> None:
        nonlocal done
        done += 1
        progress("checking", done, total)

    try:
        check_checkpoint(directory, allow_nonfinite=allow_nonfinite, ternary_falcon_h1=True, progress=count)
    except UserError as error:
        raise JobError(f"the exported checkpoint is not sound, nothing was written: {error}") from error


@contextlib.contextmanager
def _config_directory(source: MegatronCheckpoint) -> Iterator[tuple[Path, Any]]:
    """A directory with the Hugging Face config of a checkpoint, and the provider of its model."""
    from falcon_bridge.conversion.families import FAMILIES, family_of

    provider = _saved_provider(source)
    family = family_of(provider)
    if family is None:
        known = " or ".join(family.provider.__name__ for family in FAMILIES)
        raise UserError(
            f"{source.iteration_dir / 'run_config.yaml'} is of {type(provider).__name__}, which falcon-bridge does "
            f"not export: give a checkpoint of a {known}"
        )
    try:
        config = family.bridge.megatron_to_hf_config(provider)
    except ValueError as error:
        raise UserError(str(error)) from error
    if source.hf_source is not None:
        _check_same_model(family, source.hf_source, config)
        yield source.hf_source, provider
        return
    with tempfile.TemporaryDirectory(prefix="falcon_bridge_config_") as directory:
        family.hf_config(**config).save_pretrained(directory)
        yield Path(directory), provider


def _saved_provider(source: MegatronCheckpoint) -> Any:
    from megatron.bridge.training.model_load_save import load_model_config

    try:
        return load_model_config(str(source.iteration_dir))[0]
    except Exception as error:
        raise UserError(f"{source.iteration_dir / 'run_config.yaml'} cannot be read ({one_line(error)})") from error


def _check_same_model(family: "Family", hf_source: Path, trained: dict[str, Any]) -> None:
    """Refuse an export whose config.json would describe another model than the one that was trained."""
    from transformers import AutoConfig

    class _Pretrained:
        config = AutoConfig.from_pretrained(hf_source)

    kept = family.bridge.megatron_to_hf_config(family.bridge().provider_bridge(_Pretrained))
    # how the run stored and fed the model, not what it is
    ignored = {"dtype", "max_position_embeddings", "initializer_range", "mamba_chunk_size", "attention_dropout"}
    for name, value in kept.items():
        if name not in ignored and value != trained.get(name):
            raise UserError(
                f"{hf_source / 'config.json'} has {name} {json.dumps(value)}, but the model was trained with "
                f"{json.dumps(trained.get(name))}: move {hf_source} away to export the config that was trained"
            )


def _export_on_rank(
    config_dir: Path,
    iteration_dir: Path,
    target: Path,
    layout: "ParallelLayout",
    written: ExportFormat,
    names: list[str],
    max_shard_bytes: int,
) -> dict[str, int]:
    import torch.distributed as dist
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import build_and_load_model
    from transformers import AutoConfig

    from falcon_bridge.conversion.runtime import DTYPES, conversion_rank, prepare_provider

    with conversion_rank() as device:
        config = AutoConfig.from_pretrained(config_dir)
        config.dtype = DTYPES["F32"]  # so that the bridge keeps what Megatron holds in fp32; the cast is below
        if written.architecture == LLAMA:
            config.is_bitnet_config = True  # that of a dense twin does not say so
        bridge = AutoBridge.from_hf_config(config)
        provider = prepare_provider(bridge, layout, DTYPES[written.dtype], load_weights=False)
        provider.perform_initialization = False
        with reading_shards(iteration_dir):
            model = build_and_load_model(
                str(iteration_dir), provider, use_cpu_init=device.type == "cpu", skip_temp_dist_context=True
            )
        # the bridge also gives a tied head, which checkpoints do not store
        tensors = (
            (name, tensor)
            for name, tensor in bridge.export_hf_weights(model, cpu=True, show_progress=False)
            if name in names or not config.tie_word_embeddings
        )
        if dist.get_rank() != 0:
            for _ in tensors:
                pass  # gathering a tensor takes all ranks
            return {}
        done = 0

        def count(name: str) -> None:
            nonlocal done
            done += 1
            emit(("exporting", done, len(names)))

        try:
            return write_shards(written.convert(tensors), target, max_shard_bytes=max_shard_bytes, progress=count)
        except ValueError as error:  # of weights that have no ternary codes
            raise JobError(str(error)) from error
