"""Attention heads against SSM heads, 8:0 to 0:8, at equal parameters: loss and speed.

    python examples/head_ratio_sweep.py --out out/head_ratio_sweep

The two counts are independent fields of the provider, and either may be 0. Heads are 32 channels wide; with half as
many key-value groups as attention heads, a head of either kind has 3·hidden·32 weights, and the MLP's width levels
what is left (B, C and dt of the SSM). Output multipliers go as the inverse of their branch's width: TII's law.
Leaves head_ratio_sweep.json, .png and .md. On a cluster: the same fields as overrides of any recipe, as in
`falcon-bridge train --recipe falcon_h1_500m_pretrain_config model.num_attention_heads=4 model.mamba_num_heads=32 …`.
"""

from pathlib import Path
from typing import Any

import _study


RATIOS = ((8, 0), (6, 2), (4, 4), (2, 6), (0, 8))
HEAD_DIM = 32
PARAMETERS = 1_200_000


def name_of(attention: int, mamba: int) -> str:
    """How a ratio is written."""
    return f"{attention}-{mamba}"


def configuration(out: Path, attention: int, mamba: int, *, steps: int, seed: int) -> Any:
    """A run with so many heads of each kind a layer."""
    cfg = _study.configuration(out, steps=steps, seed=seed)
    model = cfg.model
    attention_width, d_ssm = model.num_attention_heads * model.kv_channels, model.d_ssm
    model.mamba_num_heads, model.mamba_head_dim = mamba, HEAD_DIM
    if attention == 0:
        # a block without attention, as its two layers: Megatron Bridge's log divides by the number of attention heads
        model.num_layers, model.layer_pattern = 2 * model.num_layers, "M-" * model.num_layers
    else:
        model.num_attention_heads, model.num_query_groups = attention, attention // 2
        model.kv_channels = HEAD_DIM
        model.attention_out_multiplier *= attention_width / (attention * HEAD_DIM)
    if mamba:
        model.ssm_out_multiplier *= d_ssm / (mamba * HEAD_DIM)
    _study.equal_parameters(model, PARAMETERS)
    return cfg


def main() -> None:
    given = _study.arguments(__doc__, steps=150)
    data = _study.prepare(given.out)
    curves = {
        name_of(*ratio): _study.curve(
            given.out,
            name_of(*ratio),
            lambda ratio=ratio: configuration(given.out, *ratio, steps=given.steps, seed=given.seed),
        )
        for ratio in RATIOS
    }
    labels = {name: name.replace("-", " : ") for name in curves}
    rows = _study.sweep_rows(curves)
    figures = {"seed": given.seed, "steps": given.steps, **data, "runs": rows, "curves": curves}
    table = _study.sweep_table("attention : SSM heads", labels, rows)
    figure = _study.sweep_plot("Attention and SSM heads a layer, equal parameters", labels, curves, rows)
    _study.save(given.out, "head_ratio_sweep", figures, table, figure)


if __name__ == "__main__":
    main()
