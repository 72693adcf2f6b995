"""The two-stage schedule of BitNet b1.58: midway the learning rate's peak drops and the weight decay ends.

Source: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, unilm/bitnet), as reproduced by 1bitLLM. The
decay runs on over the whole training; from the second stage on it is that of a lower peak, so the learning rate steps
down once. Weight decay pulls latent weights towards the border between codes, which keeps them changing: without it
the second stage settles them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.bridge.training import optim
from megatron.bridge.training.config import ConfigContainer, SchedulerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(kw_only=True)
class TwoStageSchedulerConfig(SchedulerConfig):
    """`SchedulerConfig` with a second stage, for ``ConfigContainer.scheduler``.

    Attributes beyond those of `SchedulerConfig`, whose `lr_decay_style` and warm-up hold for both stages:
        second_stage_lr: Peak of the decay in the second stage; that of the first is ``optimizer.lr``.
        second_stage_start: Where the second stage starts, as a share of the decay's steps.
    """

    second_stage_lr: float
    second_stage_start: float = 0.5

    def finalize(self) -> None:
        """Check the fields.

        Raises:
            ValueError: With one line that says what to change.
        """
        super().finalize()
        if self.second_stage_lr is None or self.second_stage_start is None:
            raise ValueError("scheduler.second_stage_lr and scheduler.second_stage_start must be numbers: set both")
        if not 0 < self.second_stage_start < 1:
            raise ValueError(
                f"scheduler.second_stage_start={self.second_stage_start} must lie between 0 and 1: it is a share of "
                "the steps"
            )


class TwoStageParamScheduler(OptimizerParamScheduler):
    """`OptimizerParamScheduler` with a second stage.

    Args:
        scheduler: Takes the place of this one, which need not be used any more.
        second_stage_lr: Peak of the decay in the second stage.
        second_stage_start: Where it starts, in the scheduler's steps, which are samples in Megatron Bridge.

    Raises:
        ValueError: The second stage has a higher learning rate than the first, or a lower one than the least, or
            starts during the warm-up.
    """

    def __init__(self, scheduler: OptimizerParamScheduler, *, second_stage_lr: float, second_stage_start: int) -> None:
        self.__dict__.update(vars(scheduler))
        if not self.min_lr <= second_stage_lr <= self.max_lr:
            raise ValueError(
                f"scheduler.second_stage_lr={second_stage_lr} must lie between optimizer.min_lr={self.min_lr} and "
                f"optimizer.lr={self.max_lr}"
            )
        if second_stage_start < self.lr_warmup_steps:
            raise ValueError(
                f"the second stage starts after {second_stage_start} samples and the warm-up ends after "
                f"{self.lr_warmup_steps}: shorten scheduler.lr_warmup_iters, or raise scheduler.second_stage_start"
            )
        self.second_stage_lr, self.second_stage_start = second_stage_lr, second_stage_start
        self.step(0)

    @property
    def in_second_stage(self) -> bool:
        """Whether the next step belongs to the second stage."""
        return self.num_steps >= self.second_stage_start

    def get_lr(self, param_group: dict) -> float:
        """The learning rate of the next step; a group with a peak of its own keeps its ratio to that of the others."""
        if not self.in_second_stage:
            return super().get_lr(param_group)
        peak = param_group.get("max_lr", self.max_lr) * (self.second_stage_lr / self.max_lr)
        return super().get_lr({**param_group, "max_lr": peak})

    def get_wd(self, param_group: dict | None = None) -> float:
        """The weight decay of the next step."""
        return 0.0 if self.in_second_stage else super().get_wd(param_group)

    def state_dict(self) -> dict:
        """The state, with that of the second stage."""
        return {
            **super().state_dict(),
            "second_stage_lr": self.second_stage_lr,
            "second_stage_start": self.second_stage_start,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a checkpoint, also from one of a run without a second stage."""
        if "second_stage_lr" in state_dict:
            self.second_stage_lr = self._check_and_set(
                self.second_stage_lr, state_dict["second_stage_lr"], "learning rate of the second stage"
            )
            self.second_stage_start = self._check_and_set(
                self.second_stage_start, state_dict["second_stage_start"], "start of the second stage"
            )
        super().load_state_dict(state_dict)
        self.step(0)  # the parent sets the parameter groups before it knows its weight decay


def two_stage_decay(
    cfg: ConfigContainer,
    lr: float,
    second_stage_lr: float,
    *,
    warmup: int,
    steps: int,
    weight_decay: float = 0.1,
    decay_style: str = "linear",
) -> None:
    """Train for `steps` steps in two stages of the same length, down to a learning rate of 0.

    Args:
        cfg: Changed in place; its scheduler is replaced.
        lr: Peak of the first stage.
        second_stage_lr: Peak of the second stage's decay, of which `decay_style` has left some part midway: half of
            it for "linear" and "cosine".
        warmup: Steps of the linear warm-up.
        steps: Of both stages.
        weight_decay: Of the first stage; the second has none.
        decay_style: As `SchedulerConfig.lr_decay_style`.
    """
    cfg.train.train_iters = steps
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.optimizer.weight_decay = lr, 0.0, weight_decay
    cfg.scheduler = TwoStageSchedulerConfig(
        second_stage_lr=second_stage_lr,
        lr_decay_style=decay_style,
        lr_decay_iters=steps,
        lr_warmup_iters=warmup,
        start_weight_decay=weight_decay,
        end_weight_decay=weight_decay,
        weight_decay_incr_style="constant",
        use_checkpoint_opt_param_scheduler=cfg.scheduler.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=cfg.scheduler.override_opt_param_scheduler,
    )


def _with_second_stage(get_scheduler: Callable[..., OptimizerParamScheduler]) -> Callable[..., Any]:
    """Bridge's `_get_scheduler`, which knows no other class than Megatron's."""

    @functools.wraps(get_scheduler)
    def build(optimizer_config, scheduler_config, optimizer) -> OptimizerParamScheduler:
        scheduler = get_scheduler(optimizer_config, scheduler_config, optimizer)
        if not isinstance(scheduler_config, TwoStageSchedulerConfig):
            return scheduler
        return TwoStageParamScheduler(
            scheduler,
            second_stage_lr=scheduler_config.second_stage_lr,
            second_stage_start=round(scheduler_config.second_stage_start * scheduler_config.lr_decay_steps),
        )

    return build


# with the configuration class, so that a run that has one gets the schedule also from Bridge's own `pretrain`
if not hasattr(optim._get_scheduler, "__wrapped__"):
    optim._get_scheduler = _with_second_stage(optim._get_scheduler)
