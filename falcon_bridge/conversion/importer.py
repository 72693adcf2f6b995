"""Hugging Face → Megatron."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from falcon_bridge.conversion.atomic import atomic_directory, check_target, is_inside
from falcon_bridge.conversion.bitnet_checkpoint import weights_form
from falcon_bridge.conversion.bitnet_config import is_scale, is_ternary_weight
from falcon_bridge.conversion.hf_checkpoint import HFCheckpoint, check_checkpoint, resolve_checkpoint
from falcon_bridge.conversion.megatron_checkpoint import keep_hf_source
from falcon_bridge.errors import UserError, one_line
from falcon_bridge.ranks import emit, run_ranks


if TYPE_CHECKING:
    from falcon_bridge.verification.layout import ParallelLayout

Progress = Callable[[str, int, int], None]

# the shards' own metadata, run_config.yaml, tokenizer: generous
_OVERHEAD_BYTES = 16 * 2**20
_NBYTES = {"F32": 4, "BF16": 2}
# weights in a matrix from which on bf16 latents made of ternary codes have the codes' scale exactly
_EXACT_IN_BF16 = 2**18


def import_checkpoint(
    hf: str | Path,
    target: str | Path,
    layout: "ParallelLayout",
    *,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> HFCheckpoint:
    """Convert a Hugging Face checkpoint to a Megatron (torch_dist) checkpoint directory.

    The result loads under any layout; `layout` is that of the conversion itself. Beside the shards it keeps
    config.json and the tokenizer (``hf_source/``), so that `exporter.export_checkpoint` needs nothing else. Weights
    keep the dtype that they have in the files; those of a packed or dequantised BitNet checkpoint become latent ones
    with the same codes and scales.

    Args:
        hf: directory or hub id.
        target: the Megatron checkpoint directory to make; it appears whole or not at all.
        layout: ranks to convert on: processes over gloo on CPU, one a GPU otherwise.
        force: replace `target`.
        allow_nonfinite: accept NaN, infinite and absurdly large weights.
        progress: called with a stage's name, steps done and steps in all.

    Returns:
        The checked source.

    Raises:
        UserError: the source, the target or the layout cannot be used.
        JobError: the conversion failed.
    """
    from falcon_bridge.conversion.runtime import preload

    check_target(target, force=force)
    path = resolve_checkpoint(hf)
    if is_inside(path, target):
        raise UserError(f"{target} holds the source {path}: choose another output directory")
    if is_inside(target, path):
        raise UserError(f"{target} is inside the source {path}: choose another output directory")
    source = check_with_progress(path, allow_nonfinite=allow_nonfinite, progress=progress)
    if source.has_tokenizer:
        _check_tokenizer(path)
    check_layout(source.path, layout)
    dtype = _storage_dtype(source)
    bytes_needed = source.parameters * _NBYTES[dtype] + _OVERHEAD_BYTES
    with atomic_directory(target, force=force, bytes_needed=bytes_needed) as partial:
        preload()
        run_ranks(
            _import_on_rank,
            layout.world_size,
            source.path,
            partial,
            layout,
            dtype,
            source.has_tokenizer,
            allow_nonfinite,
            on_event=lambda rank, event: progress(*event),
        )
        dtypes = {name: info.dtype for name, info in source.tensors.items()}
        keep_hf_source(partial, source.companions(), dtypes, weights_form(source.config, source.tensors))
    return source


def check_with_progress(hf: str | Path, *, allow_nonfinite: bool, progress: Progress) -> HFCheckpoint:
    """`check_checkpoint` that reports each tensor it read as progress."""
    checked = check_checkpoint(hf, values=False)
    done = 0

    def count(name: str) -> None:
        nonlocal done
        done += 1
        progress("checking", done, len(checked.tensors))

    return check_checkpoint(checked.path, allow_nonfinite=allow_nonfinite, progress=count)


def check_layout(config_dir: Path, layout: "ParallelLayout") -> None:
    """Refuse a layout that the model of a config.json cannot have; cheap.

    Raises:
        UserError: with the sizes that it can have.
    """
    import torch
    from transformers import AutoConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # a length and a batch that suit any layout: a conversion has neither
    seq_length = 2 * math.lcm(layout.cp, layout.tp)
    config = AutoConfig.from_pretrained(config_dir)
    if config.num_hidden_layers % layout.pp:
        # a conversion has no options for an uneven split, which `ParallelLayout.check` would advise
        raise UserError(
            f"{config.num_hidden_layers} layers do not split evenly over --pp {layout.pp} stages: choose a divisor of "
            f"{config.num_hidden_layers} (the training may use another layout)"
        )
    layout.check(config, seq_length=seq_length, batch_size=layout.dp * layout.pp, device=device)


def _check_tokenizer(path: Path) -> None:
    """Load the tokenizer as Megatron will, so that a damaged one is seen before the work."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"the tokenizer in {path} cannot be loaded ({one_line(error)}): fetch its files again, or move them away "
            "to import the weights alone"
        ) from error


def _storage_dtype(source: HFCheckpoint) -> str:
    """The dtype of the Megatron model: that of the files, the widest where they mix.

    Latent weights made of codes have a scale that depends on the number of weights where they are bf16: fp32 for small
    matrices.
    """
    packed = source.packed
    dtypes = {
        info.dtype
        for name, info in source.tensors.items()
        if not (packed and (is_ternary_weight(name) or is_scale(name)))
    }
    if "F64" in dtypes:
        raise UserError(f"{source.path} stores F64 tensors: save it in float32 or bfloat16")
    if "F16" in dtypes:
        raise UserError(f"{source.path} stores float16, which overflows in Falcon-H1: save it in bfloat16 or float32")
    smallest = min(source.matrix_sizes(), default=0)
    if weights_form(source.config, source.tensors) in ("bitnet", "bf16") and smallest < _EXACT_IN_BF16:
        return "F32"
    return "F32" if "F32" in dtypes else "BF16"


def _import_on_rank(
    source: Path, target: Path, layout: "ParallelLayout", dtype: str, has_tokenizer: bool, allow_nonfinite: bool
) -> None:
    import torch.distributed as dist
    from megatron.bridge import AutoBridge

    from falcon_bridge.conversion.runtime import DTYPES, conversion_rank, prepare_provider
    from falcon_bridge.models.falcon_edge.weights import nonfinite_latents

    with conversion_rank() as device, nonfinite_latents(allow_nonfinite):
        emit(("converting", 0, 3))
        bridge = AutoBridge.from_hf_pretrained(source)
        provider = prepare_provider(bridge, layout, DTYPES[dtype], load_weights=True)
        emit(("converting", 1, 3))
        try:
            model = provider.provide_distributed_model(
                wrap_with_ddp=False, use_cpu_initialization=device.type == "cpu", data_parallel_random_init=False
            )
        except ValueError as error:  # of weights that can be read in two ways
            raise UserError(f"{source}: {error}") from error
        emit(("converting", 2, 3))
        bridge.save_megatron_model(model, target, hf_tokenizer_path=source if has_tokenizer else None)
        dist.barrier()
        emit(("converting", 3, 3))
