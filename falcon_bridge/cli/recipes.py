"""The verb ``recipes``: the training recipes there are."""

from typing import Any

from falcon_bridge.cli.session import DebugOption, JsonOption, session


def recipes(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show the recipes: what they train, their default layout, batch and sequence length.

    [bold]Example[/bold]

    falcon-bridge recipes
    """
    with session(json, debug) as current:
        with current.status("importing Megatron, up to 30 s"):
            rows = _rows()
        from rich.table import Table

        table = Table(title="recipes for `falcon-bridge train --recipe NAME`")
        for column in ("name", "what", "parameters", "layout", "sequence", "batch", "steps"):
            table.add_column(
                column, justify="left" if column in ("name", "what", "layout") else "right", overflow="fold"
            )
        for row in rows:
            layout = f"TP {row['tp']} PP {row['pp']} CP {row['cp']}"
            table.add_row(
                row["name"],
                row["description"],
                f"{row['parameters'] / 1e9:.3f} B",
                layout,
                str(row["seq_length"]),
                str(row["global_batch_size"]),
                f"{row['train_iters']:,}",
            )
        current.show(table)
        current.finish({"ok": True, "recipes": rows})


def _rows() -> list[dict[str, Any]]:
    from falcon_bridge import recipes
    from falcon_bridge.training.memory import count_parameters

    rows = []
    for name in recipes.RECIPES:
        function = getattr(recipes, name)
        cfg = function()
        rows.append(
            {
                "name": name,
                "description": function.__doc__.splitlines()[0],
                "parameters": count_parameters(cfg.model),
                "tp": cfg.model.tensor_model_parallel_size,
                "pp": cfg.model.pipeline_model_parallel_size,
                "cp": cfg.model.context_parallel_size,
                "seq_length": cfg.dataset.seq_length,
                "global_batch_size": cfg.train.global_batch_size,
                "train_iters": cfg.train.train_iters,
            }
        )
    return rows
