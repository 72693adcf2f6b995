"""Callbacks of the training loop."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from falcon_bridge.ranks import emit


@dataclass(frozen=True)
class StepReport:
    """One training step, as the rank that has the loss saw it.

    Attributes:
        iteration: of the run, resumed steps included; the first is 1.
        loss: mean cross entropy of the global batch, in nats; None on ranks without the last pipeline stage.
        lr: learning rate of the step.
        grad_norm: before clipping.
        skipped: the optimizer did not step (a non-finite gradient).
    """

    iteration: int
    loss: float | None
    lr: float
    grad_norm: float | None
    skipped: bool


@dataclass(frozen=True)
class EvalReport:
    """A validation: the iteration before which it ran and the mean loss over its batches."""

    iteration: int
    loss: float


class StepReporter(Callback):
    """Sends the process that started the ranks a `StepReport` a step and rank, and one `EvalReport` a validation."""

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Report the step."""
        loss = (context.loss_dict or {}).get("lm loss")
        emit(
            StepReport(
                # the loop counts the step after this event
                iteration=context.state.train_state.step + 1,
                loss=None if loss is None else float(loss),
                lr=float(context.optimizer.param_groups[0]["lr"]),
                grad_norm=None if context.grad_norm is None else float(context.grad_norm),
                skipped=bool(context.skipped_iter),
            )
        )

    def on_eval_end(self, context: CallbackContext) -> None:
        """Report the validation, once: all ranks of the last pipeline stage have the same reduced loss."""
        losses = context.total_loss_dict or {}
        if "lm loss" in losses and dist.get_rank() == dist.get_world_size() - 1:
            emit(EvalReport(context.state.train_state.step, float(losses["lm loss"])))
