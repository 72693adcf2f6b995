"""The builder behind every Falcon-Edge recipe: pretraining in WSD or in two stages, and fine-tuning."""

from megatron.bridge.training.config import ConfigContainer

from falcon_bridge.bitnet.schedule import two_stage_decay
from falcon_bridge.models.falcon_edge.provider import FalconEdgeModelProvider
from falcon_bridge.recipes import _common
from falcon_bridge.recipes.schedule import warmup_stable_decay


# BitNet's FAQ: batches of 1M tokens, 375 steps of warm-up, weight decay 0.1
_PRETRAIN_BATCH_TOKENS, _PRETRAIN_WARMUP, _PRETRAIN_WEIGHT_DECAY = 2**20, 375, 0.1
# TII's sft.py of onebitllms: 16 packed rows a step
_SFT_LR, _SFT_ROWS = 1e-4, 16


def falcon_edge_pretrain(
    name: str,
    model: FalconEdgeModelProvider,
    *,
    lr: float,
    second_stage_lr: float | None = None,
    seq_length: int = 4096,
    global_batch_size: int | None = None,
    micro_batch_size: int = 1,
    train_iters: int = 100_000,
    tp: int = 1,
    pp: int = 1,
) -> ConfigContainer:
    """Pretraining of a ternary model from scratch.

    TII trained Falcon-Edge on about 1.5T tokens with WSD and published no more of it. The rest is from "The Era of
    1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, unilm/bitnet): AdamW (0.9, 0.95), weight decay 0.1, 375 steps
    of warm-up, batches of 1M tokens, 100k of them; gradients clipped at 1. Ternary models take learning rates several
    times those of dense ones. Data is mock data until ``dataset.blend`` is set.

    Args:
        name: names the output directory under ``nemo_experiments``.
        model: the provider; its layout and sequence length are set here.
        lr: peak learning rate.
        second_stage_lr: None takes WSD with an exponential decay over the last tenth, as TII; a number takes the FAQ's
            two stages instead (`bitnet.schedule`), of which this is the peak of the second.
        seq_length: tokens a row.
        global_batch_size: rows a step; None takes 1M tokens.
        micro_batch_size: rows at a time on a rank.
        train_iters: steps.
        tp: tensor-parallel size; sequence parallelism comes with it.
        pp: pipeline-parallel size.

    Returns:
        The configuration.
    """
    _common.set_layout(model, tp=tp, pp=pp)
    cfg = _common.pretrain_base(name, model, seq_length=seq_length)
    rows = global_batch_size or _PRETRAIN_BATCH_TOKENS // seq_length
    _common.set_batch(cfg, global_batch_size=rows, micro_batch_size=micro_batch_size)
    _set_adamw(cfg, weight_decay=_PRETRAIN_WEIGHT_DECAY)
    decay = train_iters // 10
    warmup = min(_PRETRAIN_WARMUP, decay)
    if second_stage_lr is None:
        warmup_stable_decay(cfg, lr, warmup=warmup, stable=train_iters - warmup - decay, decay=decay)
    else:
        two_stage_decay(
            cfg, lr, second_stage_lr, warmup=warmup, steps=train_iters, weight_decay=_PRETRAIN_WEIGHT_DECAY
        )
    return cfg


def falcon_edge_sft(
    name: str,
    model: FalconEdgeModelProvider,
    *,
    lr: float = _SFT_LR,
    seq_length: int = 4096,
    global_batch_size: int = _SFT_ROWS,
    tp: int = 1,
    pp: int = 1,
) -> ConfigContainer:
    """Fine-tuning of all weights on packed chats, through the ternary weights.

    Learning rate 1e-4 and 16 packed rows a step as in TII's sft.py (onebitllms), which has no weight decay; others
    took 5e-4 (Axolotl) and 3.2e-5 (Oumi). WSD over 1000 steps, as Megatron Bridge's fine-tuning recipes. Start it from
    a ``prequantized`` checkpoint (``--hf-path``), whose weights are latent ones.

    Args:
        name: names the output directory under ``nemo_experiments``.
        model: the provider; its layout and sequence length are set here.
        lr: learning rate of the stable phase.
        seq_length: tokens a packed row.
        global_batch_size: packed rows a step.
        tp: tensor-parallel size; sequence parallelism comes with it.
        pp: pipeline-parallel size.

    Returns:
        The configuration; the data and the checkpoint to start from are for the user to say.
    """
    _common.set_layout(model, tp=tp, pp=pp)
    cfg = _common.finetune_base(name, model, seq_length=seq_length)
    _common.set_batch(cfg, global_batch_size=global_batch_size, micro_batch_size=1)
    _set_adamw(cfg, weight_decay=0.0)
    warmup_stable_decay(cfg, lr, warmup=20, stable=490, decay=490)
    return cfg


def _set_adamw(cfg: ConfigContainer, *, weight_decay: float) -> None:
    _common.set_adamw(cfg, weight_decay=weight_decay)
    cfg.optimizer.adam_eps = 1e-8  # the 1e-16 there is Falcon-H1's
