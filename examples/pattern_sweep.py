"""Which kind of layer at which depth: patterns of six layers, at equal parameters.

    python examples/pattern_sweep.py --out out/pattern_sweep

P is a parallel block (attention and Mamba-2 side by side, then an MLP), M Mamba-2, * attention and - an MLP alone; the
MLPs' width levels the parameters. Leaves pattern_sweep.json, .png and .md. On a cluster: the same field as an override
of any recipe, `model.layer_pattern=…` with a symbol a layer, or `model.mamba_ratio` and its like, which spread the
kinds evenly.
"""

from pathlib import Path
from typing import Any

import _study


PATTERNS = {
    "PPPPPP": "parallel, as Falcon-H1",
    "PMPMPM": "every other one Mamba-2 alone",
    "M-*-M-": "Mamba-2 and attention in turn",
    "M-M-M-": "Mamba-2",
    "*-*-*-": "attention (a Transformer)",
}
PARAMETERS = 1_200_000


def configuration(out: Path, pattern: str, *, steps: int, seed: int) -> Any:
    """A run with this pattern."""
    cfg = _study.configuration(out, steps=steps, seed=seed)
    cfg.model.num_layers, cfg.model.layer_pattern = len(pattern), pattern
    _study.equal_parameters(cfg.model, PARAMETERS)
    return cfg


def main() -> None:
    given = _study.arguments(__doc__, steps=150)
    data = _study.prepare(given.out)
    curves = {
        pattern: _study.curve(
            given.out,
            pattern.replace("*", "A"),
            lambda pattern=pattern: configuration(given.out, pattern, steps=given.steps, seed=given.seed),
        )
        for pattern in PATTERNS
    }
    labels = {pattern: f"`{pattern}` {meaning}" for pattern, meaning in PATTERNS.items()}
    rows = _study.sweep_rows(curves)
    figures = {"seed": given.seed, "steps": given.steps, **data, "runs": rows, "curves": curves}
    figure = _study.sweep_plot("Layer patterns, equal parameters", {name: name for name in curves}, curves, rows)
    _study.save(given.out, "pattern_sweep", figures, _study.sweep_table("pattern", labels, rows), figure)


if __name__ == "__main__":
    main()
