"""Callbacks of Megatron Bridge's training loop for BitNet models: quantisation warm-up, statistics of the codes."""

import logging

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.utils.pg_utils import get_pg_collection

from falcon_bridge.bitnet.statistics import TernaryStatistics, ternary_linears
from falcon_bridge.bitnet.strength import quantization_strength, set_quantization_strength


logger = logging.getLogger(__name__)


def bitnet_callbacks(cfg: ConfigContainer) -> list[Callback]:
    """The callbacks that the training of a configuration needs, to be handed to Bridge's `pretrain` or `finetune`.

    Args:
        cfg: ``model.bitnet_warmup_steps`` asks for a `QuantizationWarmup`, any logger for `StatisticsLogger`.

    Returns:
        None at all for a dense model.
    """
    if not getattr(cfg.model, "use_bitnet", False):
        return []
    callbacks: list[Callback] = []
    if warning := unfinished_warmup(cfg):
        logger.warning(warning)
    if steps := getattr(cfg.model, "bitnet_warmup_steps", 0):
        callbacks.append(QuantizationWarmup(steps))
    log = cfg.logger
    if any((log.tensorboard_dir, log.wandb_project, log.mlflow_experiment, log.comet_project)):
        callbacks.append(StatisticsLogger())
    return callbacks


def unfinished_warmup(cfg: ConfigContainer) -> str | None:
    """What to tell of a quantisation warm-up that outlasts the run; None of any other."""
    steps, last = getattr(cfg.model, "bitnet_warmup_steps", 0), cfg.train.train_iters
    if not steps or last is None or steps < last:
        return None
    return (
        f"model.bitnet_warmup_steps={steps} is not over when the run ends after train.train_iters={last} steps: its "
        "model has not been trained as the ternary one that it exports to"
    )


class QuantizationWarmup(Callback):
    """Takes a dense model to a ternary one: step n, from 0, is trained at quantisation strength min(1, n/`steps`).

    Source: "Fine-tuning LLMs to 1.58bit" (Hugging Face, 2024): a linear λ, over 1000 steps. The strength follows from
    the step alone, so a resumed run goes on where it stopped. Outside of training steps it is 1: validations, and
    whatever comes after a training that ends between steps, see the ternary model.

    Args:
        steps: Steps below full strength; the first of them is dense.

    Raises:
        ValueError: `steps` is not positive.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"a quantisation warm-up needs at least one step, got {steps}")
        self._steps = steps

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Set the strength of the step."""
        set_quantization_strength(min(1.0, context.state.train_state.step / self._steps))

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Report the strength, and set it to 1."""
        if _is_logged(context):
            _log(context, {"bitnet/quantization_strength": quantization_strength()})
        set_quantization_strength(1.0)


class StatisticsLogger(Callback):
    """Logs `statistics.MatrixStatistics` of every ternary matrix every ``logger.log_interval`` steps.

    Tags are ``bitnet/zeros/layers.N.NAME``, ``bitnet/flips/…`` and ``bitnet/scale/…``, and ``bitnet/zeros/all`` and
    ``bitnet/flips/all`` over all weights; they go to TensorBoard, Weights & Biases, MLflow and Comet, where
    configured. Costs 2 bits a ternary weight, a pass over the codes a step, and one wait for the device an interval.
    """

    def __init__(self) -> None:
        self._statistics: TernaryStatistics | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Find the linears."""
        self._statistics = TernaryStatistics(ternary_linears(context.model))

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Have the step counted."""
        self._statistics.begin_step()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Log, where it is time."""
        self._statistics.end_step()
        if not _is_logged(context):
            return
        found = self._statistics.collect(get_pg_collection(context.model).pp)
        metrics = {f"bitnet/zeros/{name}": matrix.zeros for name, matrix in found.items()}
        metrics |= {f"bitnet/flips/{name}": matrix.flips for name, matrix in found.items()}
        metrics |= {f"bitnet/scale/{name}": matrix.scale for name, matrix in found.items()}
        for what in ("zeros", "flips"):
            known = [(getattr(matrix, what), matrix.elements) for matrix in found.values()]
            if known and all(share is not None for share, _ in known):
                total = sum(elements for _, elements in known)
                metrics[f"bitnet/{what}/all"] = sum(share * elements for share, elements in known) / total
        _log(context, {tag: value for tag, value in metrics.items() if value is not None})

    def on_train_end(self, context: CallbackContext) -> None:
        """Let go of the model."""
        self._statistics.close()


def _iteration(context: CallbackContext) -> int:
    """The step that just ended, from 1, as Megatron Bridge logs it; the loop counts it after the event."""
    return context.state.train_state.step + 1


def _is_logged(context: CallbackContext) -> bool:
    return _iteration(context) % context.state.cfg.logger.log_interval == 0


def _log(context: CallbackContext, metrics: dict[str, float]) -> None:
    """Write to the loggers, which the last rank has."""
    state, iteration = context.state, _iteration(context)
    if state.tensorboard_logger is not None:
        for tag, value in metrics.items():
            state.tensorboard_logger.add_scalar(tag, value, iteration)
    if state.wandb_logger is not None:
        state.wandb_logger.log(metrics, iteration)
    for metrics_logger in (state.mlflow_logger, state.comet_logger):
        if metrics_logger is not None:
            metrics_logger.log_metrics(metrics, step=iteration)
