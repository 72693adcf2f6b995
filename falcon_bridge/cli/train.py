"""The verb ``train``: a recipe here and now."""

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from falcon_bridge.cli.devices import cpu_only
from falcon_bridge.cli.session import DebugOption, JsonOption, Session, session
from falcon_bridge.errors import JobError
from falcon_bridge.ranks import launched_as_rank


def train(
    recipe: Annotated[str, typer.Option(help="Name of the recipe; `falcon-bridge recipes` lists them.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides of the recipe, in Hydra's syntax."),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Indexed dataset to train on: the prefix of its .bin and .idx.")
    ] = None,
    hf_path: Annotated[
        str | None,
        typer.Option("--hf-path", metavar="HF", help="Start from this Hugging Face checkpoint, with its tokenizer."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Ranks to start; all GPUs, or on CPU what the layout takes.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved configuration, memory and FLOPs; train nothing.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a recipe on this machine with Megatron Bridge; resumes where its checkpoint directory has a run.

    Starts its own ranks (gloo on CPU, NCCL on GPU), or is one rank where torchrun started it. Without --dataset it
    trains on mock data.

    [bold]Examples[/bold]

    falcon-bridge train --recipe falcon_h1_tiny_cpu_pretrain_config train.train_iters=20

    falcon-bridge train --recipe falcon_h1_500m_pretrain_config --hf-path ./falcon-h1-0.5b --dataset ./data/corpus

    falcon-bridge train --recipe falcon_h1_7b_pretrain_config --dry-run model.tensor_model_parallel_size=4
    """
    # a recipe for the CPU is one also where there is a GPU
    devices = cpu_only() if "cpu" in recipe.split("_") else contextlib.nullcontext()
    with devices, session(json, debug, keep_logs=launched_as_rank()) as current:
        with current.status("importing Megatron, up to 30 s"):
            from falcon_bridge.training.run import configure

            cfg = configure(recipe, overrides or [], dataset, hf_path)
        if dry_run:
            current.finish(_dry_run(current, cfg, processes))
        else:
            result = _train(current, cfg, processes)
            if _first_rank():
                current.finish(result)


def _first_rank() -> bool:
    """Whether this process speaks for all ranks."""
    return not launched_as_rank() or os.environ["RANK"] == "0"


def _dry_run(current: Session, cfg: Any, processes: int | None) -> dict[str, Any]:
    import torch
    from megatron.bridge.training.utils.omegaconf_utils import create_omegaconf_dict_config
    from omegaconf import OmegaConf
    from rich.syntax import Syntax

    from falcon_bridge.training.flops import falcon_h1_flops
    from falcon_bridge.training.memory import count_parameters, state_memory

    model = cfg.model
    ranks = processes or max(
        torch.cuda.device_count(),
        model.tensor_model_parallel_size * model.pipeline_model_parallel_size * (model.context_parallel_size or 1),
    )
    resolved, _ = create_omegaconf_dict_config(cfg)
    memory = state_memory(cfg, ranks)
    flops = falcon_h1_flops(model, cfg.train.global_batch_size)
    tokens = cfg.train.global_batch_size * cfg.dataset.seq_length
    current.show(Syntax(OmegaConf.to_yaml(resolved), "yaml", background_color="default"))
    current.show(
        f"{count_parameters(model):,} parameters on {ranks} ranks; {tokens:,} tokens and {flops:.3e} FLOPs a step; "
        f"weights, gradients and optimizer state {memory.total / 2**30:.2f} GiB a rank, activations on top"
    )
    return {
        "ok": True,
        "config": OmegaConf.to_container(resolved),
        "parameters": count_parameters(model),
        "ranks": ranks,
        "tokens_per_step": tokens,
        "flops_per_step": flops,
        "memory_bytes": {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "total": memory.total,
        },
    }


def _train(current: Session, cfg: Any, processes: int | None) -> dict[str, Any]:
    import time

    from falcon_bridge.training.callbacks import EvalReport, StepReport
    from falcon_bridge.training.run import run_pretrain

    started = time.monotonic()
    steps: list[StepReport] = []
    evaluations: list[EvalReport] = []

    def keep(rank: int, event: Any) -> bool:
        if isinstance(event, EvalReport):
            if evaluations and evaluations[-1].iteration == event.iteration:
                evaluations.pop()  # Megatron validates again at the end, on the next batches: that one stands
            evaluations.append(event)
            return False
        new = event.loss is not None and (not steps or event.iteration > steps[-1].iteration)
        if new:
            steps.append(event)
        return new

    if launched_as_rank():  # Megatron's own log of the ranks is the progress
        run_pretrain(cfg, on_event=keep)
        if not _first_rank():
            return {}
    else:
        with current.progress() as progress:
            task = progress.add_task("train", total=cfg.train.train_iters, note="setting up")

            def on_event(rank: int, event: Any) -> None:
                if keep(rank, event):
                    note = f"loss {event.loss:.4f}  lr {event.lr:.2e}"
                    progress.update(task, completed=event.iteration, note=note)

            run_pretrain(cfg, processes, on_event=on_event)
    if steps and steps[-1].loss != steps[-1].loss:
        raise JobError(f"the loss is not a number at step {steps[-1].iteration}: lower optimizer.lr")
    seconds = time.monotonic() - started
    saved = f"; checkpoints in {cfg.checkpoint.save}" if cfg.checkpoint.save else ""
    if steps:
        current.show(
            f"steps {steps[0].iteration} to {steps[-1].iteration}: loss {steps[0].loss:.4f} → {steps[-1].loss:.4f} "
            f"in {seconds:.1f} s{saved}"
        )
    elif launched_as_rank():
        current.show(f"no step to report: done before, or stopped without a checkpoint{saved}")
    else:
        current.show(f"nothing to do: {cfg.checkpoint.load} has {cfg.train.train_iters} steps already")
    return {
        "ok": True,
        "first_step": steps[0].iteration if steps else None,
        "last_step": steps[-1].iteration if steps else None,
        "losses": [step.loss for step in steps],
        "evaluations": [{"step": e.iteration, "loss": e.loss} for e in evaluations],
        "checkpoint": cfg.checkpoint.save,
        "seconds": round(seconds, 1),
    }
