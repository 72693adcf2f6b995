"""Megatron Bridge's ``pretrain`` and ``finetune`` on the ranks of this machine, or as one rank of a launcher."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.conversion.bitnet_checkpoint import weights_form
from falcon_bridge.conversion.hf_checkpoint import check_checkpoint
from falcon_bridge.conversion.megatron_checkpoint import (
    HF_SOURCE_NAME,
    copy_hf_source,
    is_megatron_checkpoint,
    keep_hf_source,
)
from falcon_bridge.errors import UserError, message_of
from falcon_bridge.ranks import launched_as_rank, run_ranks


def preload() -> None:
    """Import what training needs, so that forked ranks find it there (12–30 s, once)."""
    from megatron.bridge.training import finetune, pretrain  # noqa: F401

    from falcon_bridge.conversion.runtime import preload as preload_conversion
    from falcon_bridge.training import callbacks, forward_step, launched  # noqa: F401

    preload_conversion()


def configure(
    recipe: str,
    overrides: Iterable[str] = (),
    dataset: str | Path | Iterable[str | Path] | None = None,
    hf_path: str | None = None,
    *,
    use_bitnet: bool = False,
    peft_scheme: str | None = None,
    files: bool = True,
) -> Any:
    """A recipe's ``ConfigContainer`` with all that the user asked for, checked.

    Args:
        recipe: its name.
        overrides: ``key.sub=value`` in Hydra's syntax.
        dataset: what to train on, one or several, as `dataset.use_dataset` takes them; None or empty for the recipe's.
        hf_path: Hugging Face checkpoint to start from.
        use_bitnet: make the linear layers ternary.
        peft_scheme: adapters to train where the recipe trains adapters, "lora" or "dora"; the recipe's where None.
        files: whether the files are on this machine; if not, `dataset` and `hf_path` are left aside, and the model
            is checked only where it is the recipe's.

    Raises:
        UserError: something of this cannot be used; the message says what to change.
    """
    from falcon_bridge.training.cuda_graph import settle_cuda_graph
    from falcon_bridge.training.dataset import check_dataset, use_dataset
    from falcon_bridge.training.recipe import apply_overrides, load_recipe, use_hf_model

    overrides = list(overrides)
    cfg = load_recipe(recipe) if peft_scheme is None else _with_scheme(recipe, peft_scheme)
    datasets = [dataset] if isinstance(dataset, str | Path) else list(dataset or ())
    if files and hf_path is not None:
        use_hf_model(cfg, check_checkpoint(hf_path).path)
    if use_bitnet:
        _make_ternary(cfg)
    if files and datasets:
        use_dataset(cfg, datasets)
    if cfg.ft is None and any(override.startswith("ft.") for override in overrides):
        from megatron.bridge.training.config import FaultToleranceConfig

        cfg.ft = FaultToleranceConfig()
    apply_overrides(cfg, overrides)
    settle_cuda_graph(cfg)
    if files:
        check_dataset(cfg)
    if files or hf_path is None:
        try:
            cfg.model.finalize()
        except (ValueError, AssertionError) as error:
            raise UserError(message_of(error)) from error
    return cfg


def _with_scheme(recipe: str, peft_scheme: str) -> Any:
    from falcon_bridge import recipes
    from falcon_bridge.training.recipe import load_recipe

    if load_recipe(recipe).peft is None:
        raise UserError(f"--peft-scheme {peft_scheme} is for recipes that train adapters, and {recipe} does not")
    try:
        return getattr(recipes, recipe)(peft_scheme=peft_scheme)
    except ValueError as error:
        raise UserError(message_of(error)) from error


def _make_ternary(cfg: Any) -> None:
    if not hasattr(cfg.model, "use_bitnet"):
        raise UserError(
            f"--use-bitnet: {type(cfg.model).__name__} has no BitNet layers: use a Falcon-H1 or Falcon-Edge"
        )
    cfg.model.use_bitnet = True


def is_finetuning(cfg: Any) -> bool:
    """Whether a configuration continues from trained weights only: fine-tuning data, or adapters."""
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig

    return cfg.peft is not None or isinstance(cfg.dataset, GPTSFTDatasetConfig)


def check_start(cfg: Any) -> None:
    """Refuse a fine-tuning that has nothing to start from, or no data, and a logger that is not on this machine.

    Settings that no override went through are settled as `configure` does it (`cuda_graph.settle_cuda_graph`).

    Args:
        cfg: a ``ConfigContainer``; changed in place.

    Raises:
        UserError: the message says what to give.
    """
    from falcon_bridge.training.cuda_graph import settle_cuda_graph
    from falcon_bridge.training.loggers import check_loggers

    check_loggers(cfg)
    settle_cuda_graph(cfg)
    if not is_finetuning(cfg):
        return
    from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists

    if not cfg.checkpoint.pretrained_checkpoint and not checkpoint_exists(cfg.checkpoint.load):
        raise UserError(
            "this recipe fine-tunes and has no checkpoint to start from: give --hf-path, or "
            "checkpoint.pretrained_checkpoint=DIR for a Megatron one"
        )
    if getattr(cfg.dataset, "dataset_root", "") is None and getattr(cfg.dataset, "hf_dataset", None) is None:
        raise UserError(
            "this recipe fine-tunes and has no data: give --dataset DIR, made with `falcon-bridge data prepare-chat`"
        )


def world_size(cfg: Any, processes: int | None = None) -> int:
    """How many ranks to start here: `processes`, or every GPU, or on CPU as few as the layout takes.

    Args:
        cfg: a ``ConfigContainer``.
        processes: what the user asked for.

    Raises:
        UserError: it is not a multiple of tensor · pipeline · context parallelism, or the recipe is not for this
            machine.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and cfg.dist.distributed_backend != "gloo":
        raise UserError(
            "this recipe is for GPUs and this machine has none: use falcon_h1_tiny_cpu_pretrain_config, or --dry-run"
        )
    number = processes or (torch.cuda.device_count() if on_gpu else layout_size(cfg))
    check_layout(cfg, number)
    return number


def layout_size(cfg: Any) -> int:
    """Tensor · pipeline · context parallelism: how many ranks hold one copy of the model."""
    model = cfg.model
    return model.tensor_model_parallel_size * model.pipeline_model_parallel_size * (model.context_parallel_size or 1)


def check_layout(cfg: Any, number: int) -> None:
    """Raise where `number` ranks cannot hold the layout or share the batch of `cfg`.

    Raises:
        UserError: the message says what to change.
    """
    parallel = layout_size(cfg)
    if number % parallel:
        raise UserError(
            f"{number} ranks cannot hold TP·PP·CP = {parallel}: use a multiple of it, or a smaller layout "
            "(model.tensor_model_parallel_size and so on)"
        )
    batch, micro = cfg.train.global_batch_size, cfg.train.micro_batch_size
    if batch % (micro * (number // parallel)):
        raise UserError(
            f"train.global_batch_size={batch} must be a multiple of train.micro_batch_size={micro} times the "
            f"{number // parallel} data-parallel ranks"
        )


def run_pretrain(
    cfg: Any, processes: int | None = None, *, on_event: Callable[[int, Any], None] | None = None
) -> None:
    """Train as `cfg` says, with Megatron Bridge's own ``pretrain`` or ``finetune`` (see `is_finetuning`).

    Resumes where ``cfg.checkpoint.load`` has a run.

    Each rank sends a `callbacks.StepReport` a step and an `EvalReport` a validation to `on_event`. Where a launcher
    started this process, it joins the launcher's ranks, and `on_event` gets the reports on rank 0, those of the last
    rank, every ``cfg.logger.log_interval`` steps, at each checkpoint and at the end; see `launched.LaunchedReporter`.
    The Hugging Face files of an imported model (``hf_source/``) are handed on to ``cfg.checkpoint.save``, so that it
    exports alone.

    Args:
        cfg: a ``ConfigContainer``.
        processes: number of ranks; see `world_size`.
        on_event: called here as ``on_event(rank, report)``.

    Raises:
        UserError: the configuration cannot be used on this machine.
        JobError: a rank failed.
    """
    check_start(cfg)
    if launched_as_rank():
        check_layout(cfg, int(os.environ["WORLD_SIZE"]))
        _pretrain(cfg, on_event)
        return
    number = world_size(cfg, processes)
    preload()
    run_ranks(_pretrain, number, cfg, on_event=on_event)


def _pretrain(cfg: Any, on_event: Callable[[int, Any], None] | None = None) -> None:
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils import train_utils

    from falcon_bridge.bitnet.callbacks import bitnet_callbacks
    from falcon_bridge.training.callbacks import StepReporter
    from falcon_bridge.training.cuda_graph import GraphedIterations, forget_graphs, is_captured
    from falcon_bridge.training.forward_step import forward_step
    from falcon_bridge.training.launched import LaunchedReporter

    run = finetune if is_finetuning(cfg) else pretrain
    reporter = StepReporter() if on_event is None else LaunchedReporter(on_event, cfg.logger.log_interval)
    if cfg.checkpoint.save and os.environ.get("RANK", "0") == "0":
        _keep_hf_source(cfg)
    # Bridge's figures are a GPT's, and it divides by the number of attention heads, which may be 0; ours: --dry-run
    no_figures = mock.patch.object(train_utils, "report_theoretical_memory", lambda *args, **kwargs: None)
    with cpu_runtime(), no_figures:
        # what checks a step comes before what reports it
        graphed = [GraphedIterations()] if is_captured(cfg) else []
        try:
            run(cfg, forward_step, callbacks=[*graphed, reporter, *bitnet_callbacks(cfg)])
        except SystemExit as stop:
            # train.exit_interval and its like end the process once the checkpoint is written
            if stop.code:
                raise
        finally:
            if graphed:
                # where a signal, `train.exit_interval` or an error ended it; they hold on to communicators
                forget_graphs()


def _keep_hf_source(cfg: Any) -> None:
    pretrained = cfg.checkpoint.pretrained_checkpoint
    if not pretrained:
        return
    path, save = Path(pretrained), Path(cfg.checkpoint.save)
    if (path / "config.json").is_file() and not is_megatron_checkpoint(path):
        if not (save / HF_SOURCE_NAME).exists():
            source = check_checkpoint(path, values=False)
            keep_hf_source(
                save,
                source.companions(),
                {name: info.dtype for name, info in source.tensors.items()},
                form=weights_form(source.config, source.tensors),
            )
        return
    copy_hf_source((path.parent if path.name.startswith("iter_") else path) / HF_SOURCE_NAME, save)
