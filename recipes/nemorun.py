"""Recipes from NeMo-Run's own command line: ``nemorun falcon_bridge launch recipe=NAME run.executor=local``.

NeMo-Run imports this module by the entry point ``falcon_bridge`` of the group ``nemo_run.cli``. The executors are the
two here, and those of the user's ``workspace.py``; their fields are set from the command line, as in
``run.executor=slurm run.executor.account=research run.executor.nodes=4``.
"""

import nemo_run as run

from falcon_bridge.errors import UserError
from falcon_bridge.recipes.launch import experiment


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """One rank on this machine; ``run.executor.ntasks_per_node`` is their number."""
    return run.Config(run.LocalExecutor, ntasks_per_node=1)


@run.cli.factory
def slurm() -> run.Config[run.SlurmExecutor]:
    """A node of 8 GPUs, nothing packaged; ``run.executor.account`` and ``run.executor.partition`` are to be given."""
    return run.Config(
        run.SlurmExecutor,
        account="",
        partition="",
        nodes=1,
        gpus_per_node=8,
        time="01:00:00",
        packager=run.Config(run.Packager),
        poll_estimated_start_time=False,
    )


@run.cli.entrypoint(namespace="falcon_bridge", type="experiment")
def launch(
    ctx: run.cli.RunContext,
    recipe: str,
    overrides: list[str] = (),
    dataset: list[str] = (),
    hf_path: str = "",
    use_bitnet: bool = False,
    peft_scheme: str = "",
):
    """Train a recipe of falcon_bridge on any executor, with any plugins.

    Args:
        ctx: executor and plugins, from ``run.executor=…`` and ``run.plugins=…``.
        recipe: name of a recipe of `falcon_bridge.recipes`.
        overrides: ``key.sub=value`` in Hydra's syntax.
        dataset: what to train on, as ``falcon-bridge train --dataset`` takes it.
        hf_path: Hugging Face checkpoint to start from.
        use_bitnet: make the linear layers ternary.
        peft_scheme: adapters of a peft recipe, "lora" or "dora".

    Raises:
        UserError: as `falcon_bridge.recipes.launch.experiment`.
    """
    if isinstance(ctx.executor, run.SlurmExecutor):
        missing = [name for name in ("account", "partition") if not getattr(ctx.executor, name)]
        if missing:
            raise UserError(f"the executor lacks {' and '.join(missing)}: give run.executor.{missing[0]}=…")
    # NeMo-Run's parser knows no unions, so what is not given is empty
    job = {"hf_path": hf_path or None, "use_bitnet": use_bitnet, "peft_scheme": peft_scheme or None}
    with experiment(recipe, overrides, executor=ctx.executor, plugins=ctx.plugins, dataset=dataset, **job) as exp:
        ctx.launch(exp)
