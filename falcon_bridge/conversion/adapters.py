"""Adapter checkpoints: the runs that trained them, and their shards."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_bridge.conversion.megatron_checkpoint import (
    MegatronCheckpoint,
    find_megatron_checkpoint,
    is_megatron_checkpoint,
    reading_shards,
)
from falcon_bridge.errors import UserError, one_line


if TYPE_CHECKING:
    from falcon_bridge.verification.layout import ParallelLayout


@dataclass(frozen=True)
class AdapterCheckpoint:
    """The adapters of one iteration of a PEFT run.

    Attributes:
        checkpoint: where they are.
        peft: the scheme, a `falcon_bridge.peft.LoRA`.
        provider: of the model that they adapt, not finalized.
        base: the checkpoint of that model, Megatron or Hugging Face, as the run was told.
    """

    checkpoint: MegatronCheckpoint
    peft: Any
    provider: Any
    base: Path


def is_adapter_checkpoint(path: str | Path) -> bool:
    """Whether a Megatron checkpoint directory has adapters in the place of a model.

    Raises:
        UserError: it is no Megatron checkpoint.
    """
    return _run_config(find_megatron_checkpoint(path)).get("peft") is not None


def find_adapters(path: str | Path, base: str | Path | None = None) -> AdapterCheckpoint:
    """The adapters of a PEFT run.

    Args:
        path: the run's checkpoint directory, or one ``iter_*`` of it.
        base: the model's checkpoint, where it is no longer where the run found it.

    Raises:
        UserError: `path` has no adapters, not ours, or its base cannot be found.
    """
    from megatron.bridge.utils.instantiate_utils import instantiate

    from falcon_bridge.models.falcon_h1.provider import FalconH1ModelProvider
    from falcon_bridge.peft import LoRA

    checkpoint = find_megatron_checkpoint(path)
    config = _run_config(checkpoint)
    if config.get("peft") is None:
        raise UserError(f"{path} has a whole model, no adapters: `convert export` exports it")
    try:
        peft, provider = instantiate(config["peft"]), instantiate(config["model"])
    except Exception as error:
        raise UserError(
            f"{checkpoint.iteration_dir / 'run_config.yaml'} cannot be read ({one_line(error)})"
        ) from error
    if not isinstance(peft, LoRA) or not isinstance(provider, FalconH1ModelProvider):
        raise UserError(
            f"{path} has {type(peft).__name__} adapters of a {type(provider).__name__}: only those of "
            "falcon_bridge.peft on a FalconH1ModelProvider are exported and merged"
        )
    base = Path(base or config["checkpoint"].get("pretrained_checkpoint") or "")
    if not (is_megatron_checkpoint(base) or (base / "config.json").is_file()):
        raise UserError(f"{path} adapts {base}, which is not there: say where the model's checkpoint is now (base)")
    return AdapterCheckpoint(checkpoint, peft, provider, base)


def prepare_provider(provider: Any, layout: "ParallelLayout", **overrides: Any) -> None:
    """Make a saved provider one for `layout` and for no training, with the process groups that it needs.

    Args:
        provider: finalized in place.
        layout: what the ranks do.
        **overrides: further fields to set.
    """
    import torch

    dtype = torch.bfloat16 if provider.bf16 else torch.float32
    plain = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    provider.apply_overrides_and_finalize(
        dtype=dtype,
        overrides={
            **plain,
            "recompute_modules": None,
            "recompute_mixer": False,
            **layout.provider_fields(),
            "pipeline_dtype": dtype,
            **overrides,
        },
    )
    provider.perform_initialization = False
    provider.initialize_model_parallel(seed=0)


def load_shards(model: list[Any], iteration_dir: Path, wanted: Callable[[str], bool]) -> None:
    """Load some tensors of a checkpoint into the chunks of a model.

    Args:
        model: the chunks.
        iteration_dir: with the shards.
        wanted: whether to load the tensor of this name.

    Raises:
        UserError: the shards are damaged, or do not have such a tensor.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    chunks = unwrap_model(model)
    state = {
        f"model{number}": {
            name: value
            for name, value in chunk.sharded_state_dict().items()
            if wanted(name) and "_extra_state" not in name
        }
        for number, chunk in enumerate(chunks)
    }
    with reading_shards(iteration_dir):
        loaded = dist_checkpointing.load(state, str(iteration_dir))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"], strict=False)


def _run_config(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    from megatron.bridge.training.utils.checkpoint_utils import read_run_config

    path = checkpoint.iteration_dir / "run_config.yaml"
    try:
        config = read_run_config(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from error
    if not isinstance(config, dict) or not isinstance(config.get("checkpoint"), dict):
        raise UserError(f"{path} is not the configuration of a run: the checkpoint is damaged")
    return config
