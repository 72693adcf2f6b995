"""Callbacks of the training loop."""

import resource
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

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
        seconds: that the step took, without validations and checkpoints around it.
        tokens: of the global batch.
        flops: of all ranks, as Megatron Bridge counts them; those of the step before, which are counted by then.
        memory: peak of the rank so far, in bytes: torch's on a GPU, resident on a CPU.
        first: whether it is the first step of its process, which compiles kernels.
    """

    iteration: int
    loss: float | None
    lr: float
    grad_norm: float | None
    skipped: bool
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    memory: int = 0
    first: bool = False


@dataclass(frozen=True)
class EvalReport:
    """A validation: the iteration before which it ran and the mean loss over its batches."""

    iteration: int
    loss: float


class StepObserver(Callback):
    """Makes a `StepReport` a step and an `EvalReport` a validation, for a subclass to pass on."""

    def __init__(self) -> None:
        self._started = 0.0
        self._counted: float | None = None

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def step_report(self, context: CallbackContext) -> StepReport:
        """The step that just ended."""
        loss = (context.loss_dict or {}).get("lm loss")
        loss = None if loss is None else float(loss)  # waits for the GPU
        cfg, rows = context.state.cfg, get_current_global_batch_size()
        return StepReport(
            # the loop counts the step after this event
            iteration=context.state.train_state.step + 1,
            loss=loss,
            lr=float(context.optimizer.param_groups[0]["lr"]),
            grad_norm=None if context.grad_norm is None else float(context.grad_norm),
            skipped=bool(context.skipped_iter),
            seconds=time.monotonic() - self._started,
            tokens=rows * cfg.model.seq_length,
            first=self._counted is None,
            flops=self._flops(context, rows),
            memory=peak_memory(),
        )

    def _flops(self, context: CallbackContext, rows: int) -> float:
        counted = context.state.train_state.floating_point_operations_so_far
        before, self._counted = self._counted, counted
        if before is not None:
            return counted - before
        from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

        return num_floating_point_operations(context.state.cfg, batch_size=rows)

    def eval_report(self, context: CallbackContext) -> EvalReport | None:
        """The validation that just ended, on ranks that have its loss."""
        losses = context.total_loss_dict or {}
        if "lm loss" not in losses:
            return None
        return EvalReport(context.state.train_state.step, float(losses["lm loss"]))


class StepReporter(StepObserver):
    """Sends the process that started the ranks a `StepReport` a step and rank, and one `EvalReport` a validation."""

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Report the step."""
        emit(self.step_report(context))

    def on_eval_end(self, context: CallbackContext) -> None:
        """Report the validation, once: all ranks of the last pipeline stage have the same reduced loss."""
        report = self.eval_report(context)
        if report is not None and dist.get_rank() == dist.get_world_size() - 1:
            emit(report)


def peak_memory() -> int:
    """Bytes that this process has needed at most: torch's on its GPU, or resident ones on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
