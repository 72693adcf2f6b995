"""What rank 0 of a launcher's ranks learns about the training."""

import os
from collections.abc import Callable

import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from falcon_bridge.training.callbacks import EvalReport, StepReport


class LaunchedReporter(Callback):
    """Hands rank 0 the reports of the last rank, the one with the loss, at each checkpoint and at the end.

    Where `run_pretrain` starts the ranks itself, `callbacks.StepReporter` sends them through a pipe as they come; a
    launcher's ranks have none, and a collective a step would cost time.

    Args:
        on_event: called on rank 0 as ``on_event(rank, report)``.
    """

    def __init__(self, on_event: Callable[[int, StepReport | EvalReport], None]) -> None:
        self._on_event = on_event
        self._pending: list[StepReport | EvalReport] = []
        self._keeps = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Keep the step."""
        if not self._keeps:
            return
        loss = (context.loss_dict or {}).get("lm loss")
        self._pending.append(
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
        """Keep the validation."""
        losses = context.total_loss_dict or {}
        if self._keeps and "lm loss" in losses:
            self._pending.append(EvalReport(context.state.train_state.step, float(losses["lm loss"])))

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """Share what there is: a run that `train.exit_interval` or a signal ends saves first."""
        self._share()

    def on_train_end(self, context: CallbackContext) -> None:
        """Share the rest."""
        self._share()

    def _share(self) -> None:
        last, box = dist.get_world_size() - 1, [self._pending]
        dist.broadcast_object_list(box, src=last)
        self._pending = []
        if dist.get_rank() == 0:
            for report in box[0]:
                self._on_event(last, report)
