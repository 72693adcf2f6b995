"""Several small trainings on the same real text, their curves kept as they are done, side by side in the end."""

import argparse
import datetime
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _tiny

from falcon_bridge.demo.text import python_reference, write_indexed_dataset


SEED = _tiny.SEED
Curve = dict[str, Any]
LAST_STEPS = 20


def arguments(description: str, *, steps: int) -> argparse.Namespace:
    """The options that all studies have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory; runs that are done there are not repeated")
    parser.add_argument("--steps", type=int, default=steps, help=f"of each run ({steps})")
    parser.add_argument("--seed", type=int, default=SEED, help="of the weights and of the data's order")
    given = parser.parse_args()
    given.out = given.out.resolve()
    return given


def prepare(out: Path) -> dict[str, int]:
    """The Python reference as Megatron's indexed datasets, a tokenizer, and a checkpoint to start from; once.

    Returns:
        Tokens to learn from and held out.
    """
    from falcon_bridge.training.run import preload

    preload()
    figures = out / "data.json"
    if not figures.exists():
        _tiny.write(out, "falcon-h1")
        (out / "data").mkdir(exist_ok=True)
        tokenizer, corpus = _tokenizer(out), python_reference()
        documents = {"train": corpus.train, "held_out": corpus.held_out}
        tokens = {
            name: write_indexed_dataset(texts, tokenizer, out / "data" / name) for name, texts in documents.items()
        }
        figures.write_text(json.dumps(tokens))
    return json.loads(figures.read_text())


def configuration(out: Path, *, steps: int, seed: int, lr: float = 4e-3) -> Any:
    """The tiny CPU recipe on the text of `prepare`, with WSD over `steps`, held-out loss at the end and no checkpoint.

    Returns:
        A ``ConfigContainer`` whose model and start are for the caller to change.
    """
    from falcon_bridge.recipes import falcon_h1_tiny_cpu_pretrain_config
    from falcon_bridge.recipes.schedule import warmup_stable_decay

    cfg = falcon_h1_tiny_cpu_pretrain_config()
    warmup, decay = max(1, steps // 20), max(1, steps // 5)
    warmup_stable_decay(cfg, lr, warmup=warmup, stable=max(0, steps - warmup - decay), decay=decay)
    cfg.rng.seed = cfg.dataset.random_seed = seed
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "HuggingFaceTokenizer", str(out / "falcon-h1")
    cfg.tokenizer.vocab_size = None
    cfg.dataset.blend, cfg.dataset.split = None, None
    prefixes = [str(out / "data" / split) for split in ("train", "held_out", "held_out")]
    cfg.dataset.blend_per_split = [([prefix], None) for prefix in prefixes]
    cfg.dataset.path_to_cache = str(out / "data" / "cache")
    # once, behind the last step
    cfg.validation.eval_interval, cfg.validation.eval_iters = steps + 1, min(12, steps)
    cfg.checkpoint.save = cfg.checkpoint.load = None
    return cfg


def curve(out: Path, name: str, make: Callable[[], Any]) -> Curve:
    """Train what `make` configures, or read what an earlier call has kept.

    Returns:
        losses: ``[step, nats]`` of each step.
        held_out: nats on the held-out text after the last step.
        cpu_seconds: of a step, the first left out; unlike wall time, other work on the machine hardly changes it.
        parameters: of the model.
    """
    from falcon_bridge.training.callbacks import EvalReport, StepReport
    from falcon_bridge.training.parameters import count_parameters
    from falcon_bridge.training.run import run_pretrain

    kept = out / "curves" / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    cfg = make()
    if cfg.checkpoint.save:
        shutil.rmtree(cfg.checkpoint.save, ignore_errors=True)  # of a run that was not done
    losses, held_out, cpu = {}, [], {}

    def on_event(rank: int, event: object) -> None:
        if isinstance(event, EvalReport):
            held_out.append(event.loss)
        elif isinstance(event, StepReport) and event.loss is not None:
            losses[event.iteration], cpu[event.iteration] = event.loss, ranks_cpu_seconds()

    started = time.monotonic()
    cfg.model.finalize()
    run_pretrain(cfg, on_event=on_event)
    found = {
        "parameters": count_parameters(cfg.model),
        "losses": [[step, loss] for step, loss in losses.items()],
        "held_out": statistics.fmean(held_out),
        "cpu_seconds": (cpu[max(cpu)] - cpu[min(cpu)]) / max(1, len(cpu) - 1),
        "date": datetime.date.today().isoformat(),
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    print(f"{name}: {losses[max(losses)]:.4f} at step {max(losses)}, {time.monotonic() - started:.0f} s", flush=True)
    return found


def last_loss(found: Curve) -> float:
    """Mean training loss of the last steps, in nats."""
    return statistics.fmean(loss for _, loss in found["losses"][-LAST_STEPS:])


def ranks_cpu_seconds() -> float:
    """CPU time that the ranks which this process started have taken so far."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def smooth(losses: list, window: int = 10) -> tuple[list[int], list[float]]:
    """Steps, and means over up to `window` steps up to each."""
    steps = [step for step, _ in losses]
    return steps, [
        statistics.fmean(loss for _, loss in losses[max(0, i + 1 - window) : i + 1]) for i in range(len(steps))
    ]


def equal_parameters(model: Any, target: int) -> None:
    """Give a provider the even MLP width with which its parameters come closest to `target`.

    Megatron Bridge's warm-up of the fused SwiGLU halves the width.
    """
    from falcon_bridge.training.parameters import count_parameters

    model.ffn_hidden_size = 0
    rest = count_parameters(model)
    model.ffn_hidden_size = 2
    model.ffn_hidden_size = 2 * round((target - rest) / (count_parameters(model) - rest))


def sweep_rows(curves: Mapping[str, Curve]) -> dict[str, dict[str, float]]:
    """What a sweep compares, by run."""
    from falcon_bridge.recipes import falcon_h1_tiny_cpu_pretrain_config

    recipe = falcon_h1_tiny_cpu_pretrain_config()
    tokens = recipe.train.global_batch_size * recipe.model.seq_length
    return {
        name: {
            "parameters": found["parameters"],
            "training": last_loss(found),
            "held_out": found["held_out"],
            "tokens_per_second": tokens / found["cpu_seconds"],
        }
        for name, found in curves.items()
    }


def sweep_table(what: str, labels: Mapping[str, str], rows: Mapping[str, Mapping[str, float]]) -> str:
    """Parameters, losses and speed as Markdown."""
    lines = [
        f"| {what} | parameters | training loss, last {LAST_STEPS} steps | held-out, end | tokens a CPU second |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        figures = f"{row['parameters']:,} | {row['training']:.3f} | {row['held_out']:.3f}"
        lines.append(f"| {labels[name]} | {figures} | {row['tokens_per_second']:,.0f} |")
    return "\n".join(lines) + "\n"


def sweep_plot(
    title: str, labels: Mapping[str, str], curves: Mapping[str, Curve], rows: Mapping[str, Mapping[str, float]]
) -> Any:
    """Smoothed training losses left; held-out loss against speed right."""
    from falcon_bridge.training.plot import new_figure

    figure = new_figure(4.5)
    figure.set_figwidth(12)
    losses, speed = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, found in curves.items():
        (line,) = losses.plot(*smooth(found["losses"]), label=labels[name], linewidth=1.2)
        speed.plot(rows[name]["tokens_per_second"], rows[name]["held_out"], "o", color=line.get_color())
        at = rows[name]["tokens_per_second"], rows[name]["held_out"]
        speed.annotate(f" {labels[name]}", at, fontsize=8)
    losses.set_title(title)
    losses.set_xlabel("step")
    losses.set_ylabel("training loss (nats a token, mean of 10 steps)")
    losses.legend()
    speed.set_xlabel("tokens a CPU second, one thread")
    speed.set_ylabel("held-out loss, end")
    speed.margins(x=0.2)
    for axes in (losses, speed):
        axes.grid(alpha=0.3)
    return figure


def save(out: Path, name: str, figures: Mapping[str, Any], table: str, figure: Any) -> None:
    """Write NAME.json, NAME.md and NAME.png, and print the table."""
    import torch

    from falcon_bridge.training.report import device_name

    cfg = configuration(out, steps=10, seed=0)
    about = {"date": datetime.date.today().isoformat(), "device": device_name(cfg), "torch": torch.__version__}
    (out / f"{name}.json").write_text(json.dumps(about | rounded(dict(figures))) + "\n")
    (out / f"{name}.md").write_text(table)
    figure.savefig(out / f"{name}.png", dpi=110)
    print(table)


def rounded(value: Any) -> Any:
    """With 6 significant digits, as a reader wants them."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _tokenizer(out: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(out / "falcon-h1")
