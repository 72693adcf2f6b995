"""What is refused before a job is submitted: settings, ranks, data and checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from falcon_bridge.errors import UserError


def as_list(dataset: str | Path | Iterable[str | Path] | None) -> list[str]:
    """One dataset, several or none as a list of ``PATH[:WEIGHT]``."""
    return [str(dataset)] if isinstance(dataset, str | Path) else [str(path) for path in dataset or ()]


def check_job(recipe: str, overrides: Iterable[str], ranks: int, *, here: bool, files: bool, **training: Any) -> None:
    """Refuse a training that cannot be, in one line and before anything is written.

    Args:
        recipe: name of a recipe of `falcon_bridge.recipes`.
        overrides: ``key.sub=value`` in Hydra's syntax, those of plugins too.
        ranks: how many the executor starts.
        here: whether they run on this machine.
        files: whether the data and the checkpoint of the job are on this machine; a hub id is not looked up unless
            the job runs here.
        **training: `dataset` (a list), `hf_path`, `use_bitnet` and `peft_scheme` of `training.run.configure`.

    Raises:
        UserError: the message says what to change.
    """
    from falcon_bridge.training.run import check_start, configure

    overrides = list(overrides)
    if here:
        cfg = configure(recipe, overrides, **training)
        check_start(cfg)
    else:
        _check_paths(training["dataset"], training["hf_path"])
        cfg = _configure_for_elsewhere(recipe, overrides, files, training)
        _check_fine_tuning(cfg, recipe, overrides, training["dataset"], training["hf_path"])
    _check_ranks(cfg, ranks, here)


def _check_paths(datasets: list[str], hf_path: str | None) -> None:
    """Refuse paths that only mean something in this directory."""
    for dataset in datasets:
        if "://" not in dataset and not Path(dataset).is_absolute():
            raise UserError(
                f"the job does not run in this directory: give --dataset {dataset} as an absolute path there"
            )
    # a relative name may be a hub id
    if hf_path is not None and not Path(hf_path).is_absolute() and (hf_path.startswith(".") or Path(hf_path).exists()):
        raise UserError(f"the job does not run in this directory: give --hf-path {hf_path} as an absolute path there")


def _configure_for_elsewhere(recipe: str, overrides: list[str], files: bool, training: dict[str, Any]) -> Any:
    from falcon_bridge.training.dataset import use_dataset
    from falcon_bridge.training.recipe import load_recipe
    from falcon_bridge.training.run import configure

    datasets, hf_path = training["dataset"], training["hf_path"]
    try:
        if files and (hf_path is None or Path(hf_path).is_absolute()):
            return configure(recipe, overrides, **training)
        if files and datasets:
            use_dataset(load_recipe(recipe), datasets)  # a hub id has no model here to compare it with
        return configure(recipe, overrides, **training, files=False)
    except UserError as error:
        configure(recipe, overrides, **training, files=False)  # says so where it is not about files
        raise UserError(
            f"{error}; where the files are the job's alone, --no-check-files (check_files=False) leaves them to it"
        ) from error


def _check_fine_tuning(cfg: Any, recipe: str, overrides: list[str], datasets: list[str], hf_path: str | None) -> None:
    """Refuse a fine-tuning that is given nothing to start from, or no data, wherever that would be."""
    from falcon_bridge.training.run import is_finetuning

    if not is_finetuning(cfg):
        return
    # the recipe's own directory of checkpoints is one in the job's directory, which is new
    resumed = any(override.startswith("checkpoint.load=") for override in overrides)
    if not (hf_path or cfg.checkpoint.pretrained_checkpoint or resumed):
        raise UserError(
            f"{recipe} fine-tunes and has no checkpoint to start from: give --hf-path, or "
            "checkpoint.pretrained_checkpoint=DIR for a Megatron one"
        )
    given = datasets or getattr(cfg.dataset, "dataset_root", "") or getattr(cfg.dataset, "hf_dataset", None)
    if not given:
        raise UserError(
            f"{recipe} fine-tunes and has no data: give --dataset DIR, made with `falcon-bridge data prepare-chat`"
        )


def _check_ranks(cfg: Any, ranks: int, here: bool) -> None:
    """Refuse fewer ranks than the layout of `cfg` takes, and on this machine fewer GPUs than ranks."""
    import torch

    from falcon_bridge.training.run import check_layout

    check_layout(cfg, ranks)
    if here and cfg.dist.distributed_backend != "gloo" and ranks > torch.cuda.device_count():
        raise UserError(
            f"{ranks} ranks need {ranks} GPUs and this machine has {torch.cuda.device_count()}: use fewer, or another "
            "executor"
        )
