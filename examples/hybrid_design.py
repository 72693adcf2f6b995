"""Explore a hybrid of your own: kinds of layers, their order, heads of each kind; against Falcon-H1 of the same size.

    python examples/hybrid_design.py --out out/hybrid_design                     the design below, --steps 60
    python examples/hybrid_design.py --out out/mine --ratios P=0.5,M=0.5 --attention-heads 2 --mamba-heads 12

A pattern has a symbol a layer: P a parallel block, M Mamba-2, * attention, - an MLP alone. Ratios spread the kinds
evenly over the depth instead. On a cluster: the same fields of any recipe (`model.layer_pattern`, `model.mamba_ratio`
…, `model.num_attention_heads`, `model.mamba_num_heads`); `falcon-bridge train --dry-run` with them says what it needs.
"""

import argparse
from pathlib import Path
from typing import Any

import _study


FIELDS = {"P": "parallel_ratio", "M": "mamba_ratio", "*": "attention_ratio", "-": "mlp_ratio"}


def design(cfg: Any, given: argparse.Namespace) -> None:
    """Put the design into a configuration; `finalize` refuses in one line what cannot be built."""
    from falcon_bridge.training.parameters import count_parameters

    target = count_parameters(cfg.model)
    cfg.model.num_attention_heads = given.attention_heads
    cfg.model.mamba_num_heads = given.mamba_heads
    cfg.model.num_query_groups = max(1, given.attention_heads // 2)
    if given.ratios:
        cfg.model.num_layers = given.layers
        for ratio in given.ratios.split(","):
            symbol, _, share = ratio.partition("=")
            setattr(cfg.model, FIELDS[symbol], float(share))
    else:
        cfg.model.num_layers, cfg.model.layer_pattern = len(given.pattern), given.pattern
    _study.equal_parameters(cfg.model, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pattern", default="MPM-MPM-")
    parser.add_argument("--ratios", metavar="SYMBOL=SHARE,…", help="instead of a pattern")
    parser.add_argument("--layers", type=int, default=8, help="that the ratios are spread over")
    parser.add_argument("--attention-heads", type=int, default=2)
    parser.add_argument("--mamba-heads", type=int, default=6)
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True)
    _study.prepare(out)

    from falcon_bridge.training.flops import falcon_h1_flops

    curves, costs = {}, {}
    for name in ("Falcon-H1", "yours"):
        cfg = _study.configuration(out, steps=given.steps, seed=_study.SEED)
        if name == "yours":
            design(cfg, given)
        cfg.model.finalize()
        costs[name] = cfg.model.resolve_layer_pattern(), falcon_h1_flops(cfg.model, 1) / cfg.model.seq_length
        curves[name] = _study.curve(out, name, lambda cfg=cfg: cfg)
    rows = _study.sweep_rows(curves)
    labels = {name: f"{name}, `{kinds}`, {flops / 1e6:.1f} MFLOPs a token" for name, (kinds, flops) in costs.items()}
    table = _study.sweep_table("design", labels, rows)
    figure = _study.sweep_plot("A design of your own", {name: name for name in curves}, curves, rows)
    _study.save(out, "hybrid_design", {"curves": curves, "runs": rows}, table, figure)


if __name__ == "__main__":
    main()
