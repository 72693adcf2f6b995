"""What rank 0 of a launcher's ranks learns about the training."""

import dataclasses
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import CallbackContext

from falcon_bridge.training.callbacks import EvalReport, StepObserver, StepReport, peak_memory


class LaunchedReporter(StepObserver):
    """Hands rank 0 the reports of the last rank, the one with the loss, as often as Megatron logs, and at the end.

    Where `run_pretrain` starts the ranks itself, `callbacks.StepReporter` sends them through a pipe as they come; a
    launcher's ranks have none, and a collective a step would cost time. The memory of a step is the most of any rank.

    Args:
        on_event: called on rank 0 as ``on_event(rank, report)``.
        interval: steps between two exchanges.
    """

    def __init__(self, on_event: Callable[[int, StepReport | EvalReport], None], interval: int) -> None:
        super().__init__()
        self._on_event, self._interval = on_event, interval
        self._pending: list[StepReport | EvalReport] = []
        self._keeps = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Keep the step, and share what there is where it is time."""
        if self._keeps:
            self._pending.append(self.step_report(context))
        if (context.state.train_state.step + 1) % self._interval == 0:
            self._share()

    def on_eval_end(self, context: CallbackContext) -> None:
        """Keep the validation."""
        report = self.eval_report(context) if self._keeps else None
        if report is not None:
            self._pending.append(report)

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """Share what there is: a run that `train.exit_interval` or a signal ends saves first."""
        self._share()

    def on_train_end(self, context: CallbackContext) -> None:
        """Share the rest."""
        self._share()

    def _share(self) -> None:
        last, box = dist.get_world_size() - 1, [self._pending]
        most = torch.tensor(peak_memory(), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        dist.broadcast_object_list(box, src=last)
        self._pending = []
        if dist.get_rank() == 0:
            for report in box[0]:
                if isinstance(report, StepReport):
                    report = dataclasses.replace(report, memory=int(most))
                self._on_event(last, report)
