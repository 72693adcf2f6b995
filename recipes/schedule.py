"""Learning rates that TII's recipes give in tokens, as steps of a run."""

import math

from megatron.bridge.training.config import ConfigContainer


def lr_for_batch(lr: float, *, batch_tokens: int, reference_tokens: int) -> float:
    """The learning rate of another batch size: it grows with the root of the batch.

    Args:
        lr: learning rate at `reference_tokens` a step.
        batch_tokens: tokens of a step.
        reference_tokens: tokens of the step that `lr` was found for.

    Returns:
        ``lr·sqrt(batch_tokens/reference_tokens)`` (TII's post-training documentation; the Falcon-H1 report,
        arXiv 2507.22448, has the same rule for pretraining). It needs no term for the width: the µP multipliers see to
        that.

    Raises:
        ValueError: a number of tokens is not positive.
    """
    if batch_tokens <= 0 or reference_tokens <= 0:
        raise ValueError(f"batch_tokens={batch_tokens} and reference_tokens={reference_tokens} must be positive")
    return lr * math.sqrt(batch_tokens / reference_tokens)


def warmup_stable_decay(cfg: ConfigContainer, lr: float, *, warmup: int, stable: int, decay: int) -> None:
    """Train for `warmup` + `stable` + `decay` steps with Megatron's WSD schedule, ending at an eighth of `lr`.

    Megatron's exponential decay is ``2·2^-r - 1`` of the way from `lr` to ``optimizer.min_lr`` at the share r of the
    decay: steeper at first than a line, and done at the end of the run.

    Args:
        cfg: changed in place.
        lr: of the stable phase.
        warmup: steps of the linear warm-up.
        stable: steps at `lr`.
        decay: steps of the decay.
    """
    cfg.train.train_iters = cfg.scheduler.lr_decay_iters = warmup + stable + decay
    cfg.optimizer.lr, cfg.optimizer.min_lr = lr, lr / 8
    cfg.scheduler.lr_decay_style, cfg.scheduler.lr_wsd_decay_style = "WSD", "exponential"
    cfg.scheduler.lr_warmup_iters, cfg.scheduler.lr_wsd_decay_iters = warmup, decay
