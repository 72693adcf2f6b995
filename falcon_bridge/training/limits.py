"""Values that a training cannot have, found before it starts."""

import math
from types import SimpleNamespace
from typing import Any, get_args

from falcon_bridge.errors import UserError
from falcon_bridge.ops.ssd.backend import ScanBackend, scan_backend
from falcon_bridge.ops.ssd.offsets import ADDRESSABLE, scan_spans


_POSITIVE = (
    "train.train_iters",
    "train.global_batch_size",
    "train.micro_batch_size",
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.vocab_size",
    "model.make_vocab_size_divisible_by",
    "model.max_position_embeddings",
    "model.seq_length",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.num_layers_in_first_pipeline_stage",
    "model.num_layers_in_last_pipeline_stage",
    "model.layernorm_epsilon",
    "model.rotary_base",
    "dataset.seq_length",
    "logger.log_interval",
    "optimizer.lr",
    "optimizer.adam_eps",
    "scheduler.lr_decay_iters",
    "peft.dim",
    "peft.alpha",
    "scheduler.second_stage_lr",
)
_ATTENTION = ("model.num_query_groups", "model.kv_channels")
_SSM = (
    "model.mamba_head_dim",
    "model.mamba_state_dim",
    "model.mamba_num_groups",
    "model.conv_kernel",
    "model.chunk_size",
)
# 0 of these is a choice: no such branch, never, none
_NOT_NEGATIVE = (
    "model.num_attention_heads",
    "model.mamba_num_heads",
    "model.init_method_std",
    "model.bitnet_warmup_steps",
    "validation.eval_iters",
    "validation.eval_interval",
    "checkpoint.save_interval",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "scheduler.lr_warmup_iters",
    "scheduler.lr_wsd_decay_iters",
)
_FRACTIONS = ("optimizer.adam_beta1", "optimizer.adam_beta2")
_KINDS = {"bool": "true or false", "int": "an integer", "float": "a number"}


def check_limits(cfg: Any) -> None:
    """Refuse sizes, lengths and rates that no run can have.

    Args:
        cfg: a ``ConfigContainer``; not changed.

    Raises:
        UserError: with the first such key and what it must be.
    """
    positive = [*_POSITIVE]
    if _value(cfg, "model.num_attention_heads"):
        positive += _ATTENTION
    if _value(cfg, "model.mamba_num_heads"):
        positive += _SSM
    for key in positive:
        _check(cfg, key, "positive", lambda value: value > 0)
    for key in _NOT_NEGATIVE:
        _check(cfg, key, "0 or more", lambda value: value >= 0)
    for key in _FRACTIONS:
        _check(cfg, key, "at least 0 and below 1", lambda value: 0 <= value < 1)
    lr, least = _value(cfg, "optimizer.lr"), _value(cfg, "optimizer.min_lr")
    if lr is not None and least is not None and least > lr:
        raise UserError(f"optimizer.min_lr must be at most optimizer.lr={lr}, not {least}: set both")
    _check(cfg, "scheduler.second_stage_start", "above 0 and below 1", lambda value: 0 < value < 1)
    second = _value(cfg, "scheduler.second_stage_lr")
    if lr is not None and second is not None and second > lr:
        raise UserError(f"scheduler.second_stage_lr must be at most optimizer.lr={lr}, not {second}: set both")
    warmup, decay = _value(cfg, "scheduler.lr_warmup_iters"), _value(cfg, "scheduler.lr_decay_iters")
    if warmup is not None and decay is not None and warmup >= decay:
        raise UserError(f"scheduler.lr_warmup_iters must be below scheduler.lr_decay_iters={decay}, not {warmup}")
    _check_swiglu(cfg)
    _check_bitnet(cfg)
    _check_peft(cfg)
    _check_scan_offsets(cfg)


def check_type(key: str, old: Any, new: Any, annotation: Any = None) -> None:
    """Refuse an override that cannot be meant: Hydra's values are untyped here.

    Args:
        key: dotted.
        old: the recipe's value.
        new: what the override makes of it.
        annotation: the field's type, for where `old` is None.

    Raises:
        UserError: with what `key` must be.
    """
    if key.rpartition(".")[2] == "blend" and new is not None:
        _check_blend(key, new)
    if new is None:
        return
    if isinstance(old, list | tuple):
        numbers = bool(old) and all(_is(item, "float") for item in old)
        if not isinstance(new, list | tuple) or (numbers and not all(_is(item, "float") for item in new)):
            raise UserError(f"{key} must be a list{' of numbers' if numbers else ''}, as in [a,b], not {new!r}")
    if isinstance(old, dict) and not isinstance(new, dict):
        raise UserError(f"{key} must be a mapping, as in {key}={{a:b}}, not {new!r}")
    declared = {getattr(part, "__name__", "") for part in get_args(annotation) or (annotation,)} - {"NoneType"}
    kind = type(old).__name__
    if len(declared) == 1 and (old is None or (kind == "int" and declared == {"float"})):
        (kind,) = declared
    if kind in _KINDS and not _is(new, kind):
        raise UserError(f"{key} must be {_KINDS[kind]}, not {new!r}")


def _check_swiglu(cfg: Any) -> None:
    width, tp = _value(cfg, "model.ffn_hidden_size"), _value(cfg, "model.tensor_model_parallel_size") or 1
    if width and width % tp == 0 and width // tp % 2:
        raise UserError(
            f"model.ffn_hidden_size={width} over {tp} tensor-parallel ranks is odd, which Megatron Bridge's training "
            "set-up cannot warm up its fused SwiGLU with: choose an even number"
        )


def _check_bitnet(cfg: Any) -> None:
    if not _value(cfg, "model.use_bitnet"):
        return
    if _value(cfg, "ddp.use_megatron_fsdp"):
        raise UserError(
            "BitNet models do not train under Megatron FSDP, whose weights come and go within a step: set "
            "ddp.use_megatron_fsdp=false and ddp.use_distributed_optimizer=true"
        )
    backend = _value(cfg, "model.bitnet_backend")
    if backend in ("fused", "onebitllms") and _value(cfg, "dist.distributed_backend") == "gloo":
        raise UserError(
            f"model.bitnet_backend={backend} needs a GPU and this recipe is for a CPU: use auto or reference"
        )


def _check_peft(cfg: Any) -> None:
    """Refuse adapters that would not be trained, or would be wrong."""
    peft = getattr(cfg, "peft", None)
    if peft is None:
        return
    from falcon_bridge.peft import LoRA

    if not isinstance(peft, LoRA):
        if type(cfg.model).__module__.startswith("falcon_bridge."):
            raise UserError(
                f"peft is Megatron Bridge's own {type(peft).__name__}, which leaves in_proj's checkpoints wrong under "
                "tensor parallelism: use falcon_bridge.peft.LoRA or falcon_bridge.peft.DoRA"
            )
        return
    try:
        peft.check(cfg.model)
    except ValueError as error:
        raise UserError(str(error)) from error


def largest_scan_tensor(model: Any, tokens: int) -> int:
    """Elements that the largest of the tensors spans that the convolution's and the scan's kernels index, on one rank.

    `ops.ssd.offsets` has them. Context parallelism gives each rank the whole sequence and a share of the heads.

    Args:
        model: a `FalconH1ModelProvider`.
        tokens: of a micro batch, whole rows.
    """
    if not model.mamba_num_heads:
        return 0
    ranks = model.tensor_model_parallel_size * (model.context_parallel_size or 1)
    widths = SimpleNamespace(
        heads=model.mamba_num_heads // ranks,
        head_dim=model.mamba_head_dim,
        groups=max(1, model.mamba_num_groups // ranks),  # more ranks than groups: each has the whole of one
        d_state=model.mamba_state_dim,
        chunk_size=model.chunk_size,
        backend=scan_kernels(model),
    )
    return max(scan_spans(1, tokens, widths).values())


def scan_reach(model: Any) -> int:
    """Elements of a tensor that the scan's kernels can address.

    Args:
        model: a `FalconH1ModelProvider`.
    """
    return ADDRESSABLE[scan_kernels(model)]


def scan_kernels(model: Any) -> ScanBackend:
    """Whose kernels scan on a GPU like those that ours are made for.

    Args:
        model: a `FalconH1ModelProvider`.
    """
    return scan_backend(model.ssm_backend, model.mamba_head_dim, model.mamba_state_dim, device=None)


def _check_scan_offsets(cfg: Any) -> None:
    """Refuse rows so long that the scan's kernels would read and write elsewhere, mostly without an error."""
    model = cfg.model
    length, rows = getattr(cfg.dataset, "seq_length", None), cfg.train.micro_batch_size
    on_gpu = getattr(cfg.dist, "distributed_backend", None) != "gloo"
    if not length or not rows or not on_gpu or getattr(model, "ssm_backend", "torch") == "torch":
        return
    try:
        size, reach = largest_scan_tensor(model, rows * length), scan_reach(model)
    except ValueError as error:
        raise UserError(str(error)) from error
    if size > reach:
        raise UserError(
            f"train.micro_batch_size={rows} rows of dataset.seq_length={length} tokens are too long for the SSM's "
            f"kernels: a tensor of {size:,} elements on a rank, of which they can address {reach:,}. Use a "
            "larger model.context_parallel_size or model.tensor_model_parallel_size, or shorter rows"
        )


def _is(value: Any, kind: str) -> bool:
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    return isinstance(value, int) or (kind == "float" and isinstance(value, float) and not math.isnan(value))


def _check_blend(key: str, blend: Any) -> None:
    """A blend is a list of prefixes and their weights, or None for the weights."""
    fits = isinstance(blend, list | tuple) and len(blend) == 2
    if fits:
        prefixes, weights = blend
        fits = isinstance(prefixes, list | tuple) and bool(prefixes) and all(isinstance(p, str) for p in prefixes)
        fits = fits and (
            weights is None
            or (
                isinstance(weights, list | tuple)
                and len(weights) == len(prefixes)
                and all(_is(weight, "float") and weight >= 0 for weight in weights)
            )
        )
    if not fits:
        raise UserError(
            f"{key} must be [[PREFIX,…],null] or [[PREFIX,…],[WEIGHT,…]] with a weight for each prefix, not "
            f"{blend!r}: for one dataset, --dataset PREFIX sets it"
        )


def _check(cfg: Any, key: str, what: str, fits: Any) -> None:
    value = _value(cfg, key)
    if value is not None and not (math.isfinite(value) and fits(value)):
        raise UserError(f"{key} must be {what}, not {value}")


def _value(cfg: Any, key: str) -> int | float | None:
    """The number at a dotted key; None where there is none."""
    value = cfg
    for part in key.split("."):
        value = getattr(value, part, None)
    return value if _is(value, "float") or isinstance(value, float) else None
