"""The verb ``recipes``: the training recipes there are."""

from typing import Any

from falcon_bridge.cli.session import DebugOption, JsonOption, session
from falcon_bridge.cli.tables import parameters


def recipes(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show the recipes: what they train, their default layout, batch, sequence length, and the 80 GB GPUs they need.

    The number of GPUs is the fewest on which the memory estimate of `train --dry-run` fits.

    [bold]Example[/bold]

    falcon-bridge recipes
    """
    with session(json, debug) as current:
        with current.status("importing Megatron, up to 30 s"):
            rows = _rows()
        columns = {
            "name": [row["name"] for row in rows],
            "what": [row["description"] for row in rows],
            "parameters": [parameters(row["parameters"]) for row in rows],
            "TP·PP·CP": [f"{row['tp']}·{row['pp']}·{row['cp']}" for row in rows],
            "min GPUs": ["CPU" if row["cpu"] else str(row["gpus"] or "?") for row in rows],
            "sequence": [str(row["seq_length"]) for row in rows],
            "batch": [str(row["global_batch_size"]) for row in rows],
            "steps": [f"{row['train_iters']:,}" for row in rows],
        }
        order = ["name", "parameters", "TP·PP·CP", "min GPUs", "sequence", "batch", "steps", "what"]
        current.show_table(
            "recipes for `falcon-bridge train --recipe NAME`", columns, order=order, left={"name", "what"}
        )
        current.finish({"ok": True, "recipes": rows})


def _rows() -> list[dict[str, Any]]:
    from falcon_bridge import recipes
    from falcon_bridge.training.advice import fewest_gpus
    from falcon_bridge.training.memory import GPU_MEMORY, RESERVE, count_parameters

    rows = []
    for name in recipes.RECIPES:
        function = getattr(recipes, name)
        cfg = function()
        cfg.model.finalize()
        on_cpu = cfg.dist.distributed_backend == "gloo"
        rows.append(
            {
                "name": name,
                "description": function.__doc__.splitlines()[0],
                "parameters": count_parameters(cfg.model),
                "tp": cfg.model.tensor_model_parallel_size,
                "pp": cfg.model.pipeline_model_parallel_size,
                "cp": cfg.model.context_parallel_size,
                "cpu": on_cpu,
                "gpus": None if on_cpu else fewest_gpus(cfg, GPU_MEMORY - RESERVE),
                "seq_length": cfg.dataset.seq_length,
                "global_batch_size": cfg.train.global_batch_size,
                "train_iters": cfg.train.train_iters,
            }
        )
    return rows
