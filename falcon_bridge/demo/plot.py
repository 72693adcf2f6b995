"""The loss curve as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from falcon_bridge.training.plot import new_figure


if TYPE_CHECKING:
    from falcon_bridge.training.callbacks import StepReport


def plot_losses(steps: list["StepReport"], resumed_at: int, held_out: float, path: Path) -> None:
    """Draw the training loss over the steps, with the point of resumption and the held-out loss, as a PNG.

    Args:
        steps: of both runs, in order.
        resumed_at: last step of the first run.
        held_out: loss on held-out text at the end, in nats.
        path: of the PNG.
    """
    figure = new_figure(4.5)
    axes = figure.add_subplot()
    before = [step for step in steps if step.iteration <= resumed_at]
    after = [step for step in steps if step.iteration > resumed_at]
    axes.plot([s.iteration for s in before], [s.loss for s in before], label="training")
    axes.plot([s.iteration for s in after], [s.loss for s in after], label="training, resumed from the checkpoint")
    axes.axvline(resumed_at + 0.5, color="grey", linestyle=":", linewidth=1)
    axes.plot([steps[-1].iteration], [held_out], "o", color="black", label="held-out text, after the export")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy a token (nats)")
    axes.set_title("A small Falcon-H1 learning the Python language reference")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
