"""The builder behind every Falcon-H1 recipe: pretraining, full fine-tuning, adapters."""

import math
from typing import Literal

from megatron.bridge.training.config import ConfigContainer

from falcon_bridge.models.falcon_h1.provider import FalconH1ModelProvider
from falcon_bridge.peft import DoRA, LoRA
from falcon_bridge.recipes import _common
from falcon_bridge.recipes.schedule import lr_for_batch, warmup_stable_decay


# TII's Megatron script; the report's (arXiv 2507.22448) warm-up takes about 0.1 GT
_PRETRAIN_LR, _PRETRAIN_WEIGHT_DECAY, _PRETRAIN_WARMUP_TOKENS = 128e-5, 0.1, 100_000_000
# TII's post-training documentation: the same for every size, without weight decay
_SFT_LR, _SFT_LR_TOKENS = 128e-6, 1_000_000
_SFT_WARMUP_TOKENS, _SFT_STABLE_TOKENS, _SFT_DECAY_TOKENS = 50_000_000, 1_500_000_000, 1_500_000_000
# Megatron Bridge's default for adapters; TII published none
_PEFT_LR = 1e-4
_LONG_CONTEXT_TOKENS = 2**21

Recompute = Literal["mixer", "mixer, mlp", "full"]


def falcon_h1_pretrain(
    name: str,
    model: FalconH1ModelProvider,
    *,
    seq_length: int = 4096,
    global_batch_size: int = 512,
    micro_batch_size: int = 1,
    train_iters: int = 100_000,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    recompute: Recompute | None = None,
) -> ConfigContainer:
    """Pretraining of a Falcon-H1 with TII's settings, which µP makes the same for every width.

    AdamW (0.9, 0.95, eps 1e-16), weight decay 0.1, gradient clipping at 1, learning rate 128e-5 warmed up over 0.1 GT
    and then WSD with an exponential decay over the last tenth. TII's script also keeps the residual stream in fp32;
    here it is bf16, as in the released models' own forward pass, which halves what the layers keep of it and what
    pipeline stages send: ``model.fp32_residual_connection=true`` is TII's choice. The documents of a row are kept
    apart: no attention across them, a fresh SSM state in each. Data is mock data until ``dataset.blend`` is set.

    Args:
        name: names the output directory under ``nemo_experiments``.
        model: the provider; its layout and sequence length are set here.
        seq_length: tokens a row.
        global_batch_size: rows a step.
        micro_batch_size: rows at a time on a rank.
        train_iters: steps.
        tp: tensor-parallel size; sequence parallelism comes with it.
        pp: pipeline-parallel size.
        cp: context-parallel size.
        recompute: what the backward pass runs again instead of keeping it.

    Returns:
        The configuration.
    """
    _common.set_layout(model, tp=tp, pp=pp, cp=cp)
    _set_recompute(model, recompute)
    cfg = _common.pretrain_base(name, model, seq_length=seq_length)
    if cp > 1:
        # the ranks of a row hold different numbers of tokens that have a loss
        model.calculate_per_token_loss, cfg.ddp.average_in_collective = True, False
    _common.set_batch(cfg, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
    _common.set_adamw(cfg, weight_decay=_PRETRAIN_WEIGHT_DECAY)
    decay = train_iters // 10
    warmup = min(math.ceil(_PRETRAIN_WARMUP_TOKENS / (global_batch_size * seq_length)), train_iters // 10)
    warmup_stable_decay(cfg, _PRETRAIN_LR, warmup=warmup, stable=train_iters - warmup - decay, decay=decay)
    return cfg


def falcon_h1_long_context(
    name: str,
    model: FalconH1ModelProvider,
    *,
    seq_length: int,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    recompute: Recompute = "mixer, mlp",
) -> ConfigContainer:
    """The long stage of a pretraining: `falcon_h1_pretrain` on rows of `seq_length` under context parallelism.

    Steps keep 2M tokens. The learning rate is an eighth of the pretraining's, where its schedule ends; TII has the
    same ratio between the stages of its fine-tuning. Start it from a checkpoint (``--hf-path``).
    """
    batch = max(1, _LONG_CONTEXT_TOKENS // seq_length)
    cfg = falcon_h1_pretrain(
        name,
        model,
        seq_length=seq_length,
        global_batch_size=batch,
        train_iters=5_000,
        tp=tp,
        pp=pp,
        cp=cp,
        recompute=recompute,
    )
    cfg.optimizer.lr, cfg.optimizer.min_lr = _PRETRAIN_LR / 8, _PRETRAIN_LR / 64
    cfg.validation.eval_iters = 8
    return cfg


def falcon_h1_sft(
    name: str,
    model: FalconH1ModelProvider,
    *,
    seq_length: int = 16384,
    global_batch_size: int = 64,
    tp: int = 1,
    pp: int = 1,
    recompute: Recompute | None = None,
) -> ConfigContainer:
    """Fine-tuning of all weights on packed chats with TII's settings, the same for every size.

    Learning rate 128e-6 at 1M tokens a step and as the root of them elsewhere, no weight decay, AdamW (0.9, 0.95),
    context 16k; WSD: 50M tokens of warm-up, 1.5G stable, 1.5G exponential decay to an eighth.

    Args:
        name: names the output directory under ``nemo_experiments``.
        model: the provider; its layout and sequence length are set here.
        seq_length: tokens a packed row.
        global_batch_size: packed rows a step.
        tp: tensor-parallel size; sequence parallelism comes with it.
        pp: pipeline-parallel size.
        recompute: what the backward pass runs again instead of keeping it.

    Returns:
        The configuration; the data and the checkpoint to start from are for the user to say.
    """
    _common.set_layout(model, tp=tp, pp=pp)
    _set_recompute(model, recompute)
    cfg = _common.finetune_base(name, model, seq_length=seq_length)
    _common.set_batch(cfg, global_batch_size=global_batch_size, micro_batch_size=1)
    _common.set_adamw(cfg, weight_decay=0.0)
    tokens = global_batch_size * seq_length
    warmup_stable_decay(
        cfg,
        lr_for_batch(_SFT_LR, batch_tokens=tokens, reference_tokens=_SFT_LR_TOKENS),
        warmup=math.ceil(_SFT_WARMUP_TOKENS / tokens),
        stable=math.ceil(_SFT_STABLE_TOKENS / tokens),
        decay=math.ceil(_SFT_DECAY_TOKENS / tokens),
    )
    return cfg


def falcon_h1_peft(
    name: str,
    model: FalconH1ModelProvider,
    peft_scheme: str,
    *,
    seq_length: int = 16384,
    global_batch_size: int = 32,
    tp: int = 1,
    pp: int = 1,
    recompute: Recompute | None = None,
) -> ConfigContainer:
    """Adapters on both branches and the MLP, trained on packed chats; conv and 1-D parameters stay as they are.

    Rank, alpha and learning rate are Megatron Bridge's defaults; the rest is `falcon_h1_sft`'s, with the shape of its
    schedule over 1,000 steps.

    Args:
        name: names the output directory under ``nemo_experiments``.
        model: the provider; its layout and sequence length are set here.
        peft_scheme: "lora" or "dora".
        seq_length: tokens a packed row.
        global_batch_size: packed rows a step.
        tp: tensor-parallel size; sequence parallelism comes with it.
        pp: pipeline-parallel size.
        recompute: what the backward pass runs again instead of keeping it.

    Returns:
        The configuration; the data and the checkpoint to start from are for the user to say.

    Raises:
        ValueError: there is no such scheme.
    """
    schemes = {"lora": LoRA, "dora": DoRA}
    if peft_scheme not in schemes:
        raise ValueError(f"peft_scheme={peft_scheme!r} is not known: use 'lora' or 'dora'")
    _common.set_layout(model, tp=tp, pp=pp)
    _set_recompute(model, recompute)
    cfg = _common.finetune_base(name, model, seq_length=seq_length, peft=schemes[peft_scheme]())
    _common.set_batch(cfg, global_batch_size=global_batch_size, micro_batch_size=1)
    _common.set_adamw(cfg, weight_decay=0.0)
    warmup_stable_decay(cfg, _PEFT_LR, warmup=20, stable=490, decay=490)
    return cfg


def _set_recompute(model: FalconH1ModelProvider, recompute: Recompute | None) -> None:
    if recompute == "full":
        model.recompute_granularity, model.recompute_method, model.recompute_num_layers = "full", "uniform", 1
        return
    model.recompute_mixer = recompute is not None
    if recompute == "mixer, mlp":
        model.recompute_granularity, model.recompute_modules = "selective", ["mlp"]
