"""Packed chat data of a fine-tuning recipe, as ``falcon-bridge data prepare-chat`` makes it."""

import math
from pathlib import Path
from typing import Any

from falcon_bridge.data.info import (
    METADATA_NAME,
    TOKENIZER_NAME,
    TRAINING_NAME,
    VALIDATION_NAME,
    DatasetInfo,
    sft_info,
)
from falcon_bridge.errors import UserError


def use_sft_dataset(cfg: Any, path: str | Path, *, tokenizer: str | Path | None = None) -> None:
    """Fine-tune on packed chat data, with Megatron Bridge's own packed datasets.

    Sets ``cfg.dataset`` and, so that they fit, ``model.seq_length``, ``train.micro_batch_size`` (1: a row is packed
    already), the tokenizer, the per-token loss under context parallelism, and no validation where the data has none.
    `sync_sft_dataset` sets them again after overrides of the layout; `check_sft_dataset` finds what cannot work.

    Args:
        cfg: a ``ConfigContainer``; changed in place.
        path: the directory that ``falcon-bridge data prepare-chat`` made.
        tokenizer: Hugging Face tokenizer of the model; None keeps the configuration's where it is a local one, and
            else takes the copy beside the data. Its vocabulary must be that of the data.

    Raises:
        UserError: `path` is not such a directory.
    """
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig
    from megatron.bridge.data.packing import PackedSequenceSpecs

    path = Path(path).absolute()
    info = sft_info(path)
    validation = path / VALIDATION_NAME
    old = cfg.dataset
    loading = {
        name: getattr(old, name)
        for name in ("num_workers", "data_sharding", "pin_memory", "persistent_workers")
        if old is not None
    }
    cfg.dataset = GPTSFTDatasetConfig(
        dataset_root=str(path),
        seq_length=info.seq_length,
        seed=cfg.rng.seed,
        enable_offline_packing=True,
        offline_packing_specs=PackedSequenceSpecs(
            packed_sequence_size=info.seq_length,
            packed_train_data_path=str(path / TRAINING_NAME),
            packed_val_data_path=str(validation) if validation.is_file() else None,
            packed_metadata_path=str(path / METADATA_NAME),
            pad_seq_to_mult=info.pad_multiple,
            tokenizer_model_name=TOKENIZER_NAME,
        ),
        # rows of one width: pipeline stages need it, and memory is the same at every step
        dataset_kwargs={"pad_to_max_length": True},
        do_validation=validation.is_file(),
        do_test=False,
        **loading,
    )
    current = cfg.tokenizer.tokenizer_model
    if tokenizer is not None or not _is_local(current):
        current = str(tokenizer or path / TOKENIZER_NAME)
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "HuggingFaceTokenizer", current
    cfg.tokenizer.vocab_size = None
    sync_sft_dataset(cfg)


def sync_sft_dataset(cfg: Any) -> None:
    """Bring model, training and validation in line with packed chat data.

    The rules of Megatron Bridge's own runner, which it applies to its own recipes only.

    Args:
        cfg: a ``ConfigContainer`` that `use_sft_dataset` has prepared; changed in place.
    """
    cfg.model.seq_length = cfg.dataset.seq_length
    cfg.train.micro_batch_size = 1
    if not cfg.dataset.do_validation:
        cfg.validation.eval_iters = 0
    if (cfg.model.context_parallel_size or 1) > 1:
        # a rank may have no answer in its share of a row
        cfg.model.calculate_per_token_loss = True
        cfg.ddp.average_in_collective = False


def pad_multiple(tp: int = 1, cp: int = 1, sequence_parallel: bool = False) -> int:
    """What the length of a packed row must be a multiple of: ``lcm(2·CP, CP·TP if SP)``, as Megatron Bridge has it."""
    return math.lcm(2 * cp if cp > 1 else 1, cp * tp if sequence_parallel else 1)


def check_sft_dataset(cfg: Any) -> DatasetInfo:
    """Refuse packed chat data that does not fit the model, its layout or its tokenizer.

    Args:
        cfg: a ``ConfigContainer`` whose dataset is a ``GPTSFTDatasetConfig`` with packed Parquet files.

    Raises:
        UserError: a file is missing or empty, or something does not fit; the message says what to change.
    """
    from falcon_bridge.training.vocabulary import check_tokenizer, check_vocabulary

    dataset, model = cfg.dataset, cfg.model
    path = Path(dataset.dataset_root)
    info = sft_info(path)
    _check_rows(path / TRAINING_NAME, "train.global_batch_size", cfg.train.global_batch_size)
    if dataset.do_validation and cfg.validation.eval_iters:
        batch = cfg.validation.eval_global_batch_size or cfg.train.global_batch_size
        _check_rows(path / VALIDATION_NAME, "validation.eval_global_batch_size", batch)
    if dataset.seq_length != info.seq_length:
        raise UserError(
            f"{path} is packed to rows of {info.seq_length} tokens, not dataset.seq_length={dataset.seq_length}: "
            "leave that unset, or pack again with `data prepare-chat --seq-length`"
        )
    tp, cp = model.tensor_model_parallel_size, model.context_parallel_size or 1
    multiple = pad_multiple(tp, cp, model.sequence_parallel)
    # without context parallelism ranks share the row, whatever its conversations are
    fits = info.pad_multiple % multiple == 0 if cp > 1 else info.seq_length % multiple == 0
    if not fits or info.seq_length % multiple:
        options = f"--tp {tp} --cp {cp}" + (" --sequence-parallel" if model.sequence_parallel else "")
        raise UserError(
            f"{path} is packed to multiples of {info.pad_multiple}, and TP {tp} with CP {cp} needs multiples of "
            f"{multiple}: pack again with `data prepare-chat {options}`"
        )
    check_vocabulary(str(path), info.max_token_id, model.vocab_size)
    check_tokenizer(cfg, str(path), info)
    return info


def _is_local(tokenizer: Any) -> bool:
    return tokenizer is not None and Path(tokenizer).is_dir()


def _check_rows(path: Path, key: str, batch: int) -> None:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_metadata(path).num_rows
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: make it again with `falcon-bridge data prepare-chat`") from None
    except Exception as error:
        raise UserError(f"{path} is not a Parquet file ({type(error).__name__}): make it again") from error
    if rows < batch:
        raise UserError(
            f"{path} has {rows} rows, fewer than a batch of {batch}: lower {key}, or give more conversations"
        )
