"""The figures of run.py as a picture."""

import json
import sys
from pathlib import Path


def plot(figures: dict, path: Path) -> None:
    """Draw held-out and training losses, the conversion of the dense model, and the statistics of the codes."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    curves = figures["curves"]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    scratch, conversion, codes = figure.subplots(1, 3)
    for name, label, color in (("dense", "dense twin", "tab:blue"), ("ternary", "ternary", "tab:orange")):
        scratch.plot(*zip(*curves[name]["training"], strict=True), color=color, alpha=0.3)
        scratch.plot(*zip(*curves[name]["held_out"], strict=True), "o-", color=color, label=label, markersize=4)
    scratch.plot(
        *zip(*curves["ternary_resumed"]["training"], strict=True), ":", color="black", label="ternary, resumed"
    )
    end = figures["runs"]["ternary"]["steps"]
    reloaded = curves["from_prequantized"]
    later = [[(end + step, loss) for step, loss in reloaded[kind]] for kind in ("training", "held_out")]
    scratch.plot(*zip(*later[0], strict=True), color="tab:purple", alpha=0.3)
    label = "ternary, exported as prequantized and loaded"
    scratch.plot(*zip(*later[1], strict=True), "o-", color="tab:purple", label=label, markersize=4)
    scratch.set_title("From scratch, same data and settings")
    runs = (
        ("dense_on", "dense, trained on", "tab:blue"),
        ("cold_switch", "ternary at once", "tab:red"),
        ("warmed_up", "ternary, λ warm-up", "tab:green"),
    )
    for name, label, color in runs:
        conversion.plot(*zip(*smooth(curves[name]["training"]), strict=True), color=color, alpha=0.4)
        conversion.plot(*zip(*curves[name]["held_out"], strict=True), "o-", color=color, label=label, markersize=4)
    conversion.axvline(figures["runs"]["warmed_up"]["warmup"], color="grey", linestyle=":", linewidth=1)
    conversion.set_title("From the dense model's weights (dotted: λ = 1)")
    for axes in (scratch, conversion):
        axes.set_xlabel("step")
        axes.set_ylabel("cross entropy a token (nats), held-out; faint: training")
    for name, color in (("ternary", "tab:orange"), ("cold_switch", "tab:red"), ("warmed_up", "tab:green")):
        codes.plot(*zip(*curves[name]["statistics"]["bitnet/flips/all"], strict=True), color=color, label=name)
    codes.set_yscale("log")
    codes.set_title("Share of codes that change in a step")
    codes.set_xlabel("step")
    for axes in (scratch, conversion, codes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def smooth(losses: list, window: int = 20) -> list[tuple[int, float]]:
    """Means over up to `window` steps before each; the rows of a step differ in how hard they are."""
    means = []
    for i, (step, _) in enumerate(losses):
        last = [loss for _, loss in losses[max(0, i + 1 - window) : i + 1]]
        means.append((step, sum(last) / len(last)))
    return means


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
