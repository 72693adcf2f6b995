"""Loss and speed of a run as a picture."""

import io
import statistics
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from falcon_bridge.training.callbacks import EvalReport, StepReport


def new_figure(height: float):
    """An empty matplotlib figure that needs no display."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    return Figure(figsize=(8, height), layout="constrained")


def plot_training(title: str, steps: list["StepReport"], evaluations: list["EvalReport"]) -> bytes:
    """Draw training and validation loss, and tokens a second below, over the steps.

    Args:
        title: above it.
        steps: in order, at least one.
        evaluations: in order.

    Returns:
        A PNG.
    """
    figure = new_figure(6)
    loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    numbers = [step.iteration for step in steps]
    loss.plot(numbers, [step.loss for step in steps], label="training", linewidth=1)
    if evaluations:
        loss.plot([e.iteration for e in evaluations], [e.loss for e in evaluations], "o-", label="validation")
    loss.set_ylabel("cross entropy a token (nats)")
    loss.set_title(title)
    loss.legend()
    timed = [step for step in steps if step.seconds > 0]
    rates = [step.tokens / step.seconds for step in timed]
    speed.plot([step.iteration for step in timed], rates, linewidth=1, color="tab:green")
    if rates:
        # a first step that compiles kernels would flatten all others
        speed.set_ylim(0, 1.3 * max(statistics.median(rates), statistics.quantiles([*rates, *rates], n=20)[-1]))
    speed.set_ylabel("tokens/s")
    speed.set_xlabel("step")
    for axes in (loss, speed):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
