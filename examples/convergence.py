"""Falcon-H1 and its BitNet twin learning real text; the same run under TP 2, and resumed in the middle.

    python examples/convergence.py --out out/convergence

All start from one Hugging Face checkpoint with random weights and see the same batches. Leaves convergence.json, .png
and .md. On a cluster: take a recipe for GPUs in `_study.configuration`, your data, and the layout that you will use.
"""

from pathlib import Path
from typing import Any

import _study


def configuration(out: Path, name: str, *, steps: int, seed: int) -> Any:
    """The run `name`: dense, ternary, tp2, resumed, or resumed_tp2."""
    from falcon_bridge.training.recipe import use_hf_model

    cfg = _study.configuration(out, steps=steps, seed=seed)
    cfg.model.use_bitnet = name == "ternary"
    if name.endswith("tp2"):
        cfg.model.tensor_model_parallel_size, cfg.model.sequence_parallel = 2, True
    use_hf_model(cfg, out / "falcon-h1")
    if name == "dense":
        cfg.checkpoint.save, cfg.checkpoint.save_interval = str(out / "runs" / name), half(steps)
    if name.startswith("resumed"):
        cfg.checkpoint.load, cfg.checkpoint.ckpt_step = str(out / "runs" / "dense"), half(steps)
    return cfg


def half(steps: int) -> int:
    """Where the first run leaves a checkpoint."""
    return steps // 2


def differences(curves: dict[str, _study.Curve], name: str) -> dict[str, float]:
    """How far the losses of a run are from those of the dense one, at the same steps."""
    dense = dict(map(tuple, curves["dense"]["losses"]))
    gaps = [abs(loss - dense[step]) for step, loss in curves[name]["losses"]]
    return {"steps": len(gaps), "first_10_max": max(gaps[:10]), "max": max(gaps), "mean": sum(gaps) / len(gaps)}


def main() -> None:
    given = _study.arguments(__doc__, steps=200)
    data = _study.prepare(given.out)
    curves = {
        name: _study.curve(
            given.out, name, lambda name=name: configuration(given.out, name, steps=given.steps, seed=given.seed)
        )
        for name in ("dense", "ternary", "tp2", "resumed", "resumed_tp2")
    }
    gaps = {name: differences(curves, name) for name in ("tp2", "resumed", "resumed_tp2")}
    figures = {"seed": given.seed, "steps": given.steps, **data, "differences": gaps, "curves": curves}
    _study.save(given.out, "convergence", figures, table(curves, gaps), plot(curves, given.steps))


def table(curves: dict[str, _study.Curve], gaps: dict[str, dict[str, float]]) -> str:
    """Losses, and distances from the dense run, as Markdown."""
    rows = [
        f"| run | steps | first step | last {_study.LAST_STEPS} steps | held-out, end | max Δ, its first 10 steps "
        "| max Δ | mean Δ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in curves.items():
        losses, gap = found["losses"], gaps.get(name)
        cells = [name, f"{losses[0][0]}–{losses[-1][0]}", f"{losses[0][1]:.4f}", f"{_study.last_loss(found):.4f}"]
        cells.append(f"{found['held_out']:.4f}")
        cells += ["", "", ""] if gap is None else [f"{gap[key]:.1e}" for key in ("first_10_max", "max", "mean")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def plot(curves: dict[str, _study.Curve], steps: int):
    """Dense and ternary left; the dense run again under TP 2 and resumed right, with their distances below."""
    from falcon_bridge.training.plot import new_figure

    figure = new_figure(5.5)
    figure.set_figwidth(11)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
    twins, same = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    gaps = figure.add_subplot(grid[1, 1], sharex=same)
    for name, label, color in (("dense", "Falcon-H1", "tab:blue"), ("ternary", "its BitNet twin", "tab:orange")):
        twins.plot(*zip(*curves[name]["losses"], strict=True), color=color, alpha=0.25)
        twins.plot(*_study.smooth(curves[name]["losses"]), color=color, label=label)
        twins.plot([steps], [curves[name]["held_out"]], "o", color=color, label=f"{label}, held-out")
    styles = (
        ("dense", "one rank", "tab:blue", "-"),
        ("tp2", "TP 2", "tab:green", "--"),
        ("resumed", "resumed", "black", ":"),
        ("resumed_tp2", "resumed under TP 2", "tab:red", "-."),
    )
    dense = dict(map(tuple, curves["dense"]["losses"]))
    for name, label, color, line in styles:
        same.plot(*zip(*curves[name]["losses"], strict=True), line, color=color, label=label)
        if name != "dense":
            distance = [abs(loss - dense[step]) for step, loss in curves[name]["losses"]]
            gaps.plot([step for step, _ in curves[name]["losses"]], distance, ".", color=color, markersize=3)
    gaps.set_yscale("symlog", linthresh=1e-7)
    gaps.set_ylabel("distance (nats)")
    twins.set_title("Dense and ternary (mean of 10 steps)")
    same.set_title("The dense run, four ways")
    twins.set_ylabel("cross entropy a token (nats)")
    for axes in (twins, gaps):
        axes.set_xlabel("step")
    for axes in (twins, same, gaps):
        axes.grid(alpha=0.3)
    twins.legend()
    same.legend()
    return figure


if __name__ == "__main__":
    main()
