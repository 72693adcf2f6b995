"""Falcon-Edge against its dense twin on real text, and two ways to make a dense model ternary.

    python examples/bitnet_vs_dense/run.py --out out/bitnet_vs_dense

Trains a small Falcon-Edge on two CPU cores with Megatron Bridge's own loop, on the Python language reference: ternary
and dense from scratch, the dense checkpoint on as dense, as ternary at once and as ternary with a warm-up of the
quantisation, and a resumed and an exported and imported ternary checkpoint. Leaves
bitnet_vs_dense.json, bitnet_vs_dense.png and table.md. Every number comes from fixed seeds.
"""

import argparse
import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from plot import plot

from falcon_bridge.demo.text import python_reference, train_tokenizer, write_indexed_dataset


SEED, VOCAB_SIZE, SEQ_LENGTH, ROWS = 1234, 1021, 128, 8


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: Of its directory.
        use_bitnet: Ternary, or the dense twin.
        steps: When it ends.
        lr: Of the stable phase of WSD.
        start: The run whose last checkpoint's weights it starts from, or a Hugging Face directory; random where None.
        warmup: Steps of the quantisation's warm-up.
        resume_at: Goes on from the checkpoint of `start` at this step, optimizer and data included.
    """

    name: str
    use_bitnet: bool
    steps: int
    lr: float
    start: str | None = None
    warmup: int = 0
    resume_at: int | None = None


@dataclass
class Curve:
    """What came out of a run: (step, loss) in nats, of training and on held-out text, and the codes' statistics."""

    training: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    statistics: dict[str, list[tuple[int, float]]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def plan(steps: int, lr: float) -> list[Run]:
    """The runs, in order; `steps` is the length of the training from scratch."""
    more, half = steps // 2, steps // 2
    return [
        Run("dense", False, steps, lr),
        Run("ternary", True, steps, lr),
        Run("ternary_resumed", True, min(steps, half + 20), lr, start="ternary", resume_at=half),
        Run("dense_on", False, more, lr / 2, start="dense"),
        Run("cold_switch", True, more, lr / 2, start="dense"),
        Run("warmed_up", True, more, lr / 2, start="dense", warmup=more // 2),
        Run("from_prequantized", True, more // 2, lr / 2, start="prequantized"),
    ]


def configuration(run: Run, out: Path, steps: int):
    """The tiny CPU recipe with the run's model, data and directories."""
    from falcon_bridge.recipes.falcon_edge import falcon_edge_tiny_cpu_pretrain_config
    from falcon_bridge.recipes.schedule import warmup_stable_decay
    from falcon_bridge.training.recipe import use_hf_model

    cfg = falcon_edge_tiny_cpu_pretrain_config()
    save = out / "runs" / run.name
    if run.start == "prequantized":
        use_hf_model(cfg, out / "prequantized")
        cfg.model.finalize()
    elif run.resume_at:
        cfg.checkpoint.load, cfg.checkpoint.ckpt_step = str(out / "runs" / run.start), run.resume_at
    elif run.start:
        cfg.checkpoint.pretrained_checkpoint = str(out / "runs" / run.start)
    cfg.model.use_bitnet, cfg.model.bitnet_warmup_steps = run.use_bitnet, run.warmup
    cfg.model.vocab_size = VOCAB_SIZE
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "HuggingFaceTokenizer", str(out / "tokenizer")
    cfg.tokenizer.vocab_size = None
    length = steps if run.resume_at else run.steps
    warmup, decay = max(1, length // 20), max(1, length // 5)
    warmup_stable_decay(cfg, run.lr, warmup=warmup, stable=length - warmup - decay, decay=decay)
    if run.resume_at:
        # the order of the data follows from train_iters, which stays that of the whole run
        cfg.train.exit_interval = run.steps
    cfg.rng.seed = cfg.dataset.random_seed = SEED
    cfg.dataset.blend, cfg.dataset.split = None, None
    prefixes = {name: str(out / "data" / name) for name in ("train", "held_out")}
    cfg.dataset.blend_per_split = [([prefixes[name]], None) for name in ("train", "held_out", "held_out")]
    cfg.dataset.path_to_cache = str(out / "data" / "cache")
    cfg.validation.eval_interval, cfg.validation.eval_iters = max(1, length // 6), 8
    cfg.checkpoint.save = str(save)
    if not run.resume_at:
        cfg.checkpoint.load = str(save)
    cfg.checkpoint.save_interval = max(1, steps // 2)
    cfg.logger.tensorboard_dir = str(save / "tensorboard")
    return cfg


def train(run: Run, out: Path, steps: int) -> Curve:
    """Do a run on one rank, as `falcon-bridge train` does it."""
    from falcon_bridge.training.callbacks import EvalReport, StepReport
    from falcon_bridge.training.run import run_pretrain

    curve, cfg = Curve(), configuration(run, out, steps)

    def on_event(rank: int, event: object) -> None:
        if isinstance(event, StepReport):
            curve.training.append((event.iteration, event.loss))
        elif isinstance(event, EvalReport):
            validations.setdefault(event.iteration, []).append(event.loss)

    validations: dict[int, list[float]] = {}
    started = time.monotonic()
    run_pretrain(cfg, 1, on_event=on_event)
    curve.seconds = round(time.monotonic() - started, 1)
    # the last step is followed by two, on different rows
    curve.held_out = [(iteration, sum(losses) / len(losses)) for iteration, losses in validations.items()]
    curve.statistics = logged(Path(cfg.logger.tensorboard_dir))
    return curve


def logged(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The sums over all layers that the BitNet callbacks wrote to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    wanted = ("bitnet/zeros/all", "bitnet/flips/all", "bitnet/quantization_strength")
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag in wanted
    }


def prepare(out: Path) -> dict[str, int]:
    """Text, tokenizer, Megatron's indexed datasets."""
    corpus = python_reference()
    tokenizer = train_tokenizer(corpus.train, VOCAB_SIZE, out / "tokenizer", 1024)
    (out / "data").mkdir()
    return {
        "train_tokens": write_indexed_dataset(corpus.train, tokenizer, out / "data" / "train"),
        "held_out_tokens": write_indexed_dataset(corpus.held_out, tokenizer, out / "data" / "held_out"),
    }


def export_prequantized(out: Path) -> None:
    """The ternary run's latent weights as a Hugging Face checkpoint."""
    from falcon_bridge.conversion.exporter import export_checkpoint
    from falcon_bridge.verification.layout import ParallelLayout

    export_checkpoint(out / "runs" / "ternary", out / "prequantized", ParallelLayout(), format="prequantized")


def main() -> None:
    """Do all runs, write the figures and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--steps", type=int, default=240, help="of the training from scratch")
    parser.add_argument("--lr", type=float, default=4e-3, help="its learning rate")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    from falcon_bridge.training.run import preload

    preload()
    figures = prepare(out)
    curves = {}
    for run in plan(arguments.steps, arguments.lr):
        if run.start == "prequantized":
            export_prequantized(out)
        curves[run.name] = train(run, out, arguments.steps)
        last = curves[run.name]
        print(f"{run.name}: {last.training[-1][1]:.4f} at step {last.training[-1][0]}, {last.seconds:.0f} s")
    whole, resumed = dict(curves["ternary"].training), curves["ternary_resumed"].training
    figures |= {
        "seed": SEED,
        "tokens_a_step": ROWS * SEQ_LENGTH,
        "resume_is_exact": bool(resumed) and all(whole[step] == loss for step, loss in resumed),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "runs": {run.name: dataclasses.asdict(run) for run in plan(arguments.steps, arguments.lr)},
        "curves": {name: rounded(dataclasses.asdict(curve)) for name, curve in curves.items()},
    }
    (out / "bitnet_vs_dense.json").write_text(json.dumps(figures) + "\n")
    plot(figures, out / "bitnet_vs_dense.png")
    (out / "table.md").write_text(table(figures))
    print((out / "table.md").read_text())


def rounded(value):
    """With 5 digits, as a reader wants them."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def table(figures: dict) -> str:
    """The runs' losses as Markdown."""
    rows = ["| run | steps | first step | last 20 steps | held-out, end |", "|---|---|---|---|---|"]
    for name, curve in figures["curves"].items():
        losses = [loss for _, loss in curve["training"]]
        last = losses[-20:]
        mean = sum(last) / len(last)
        held_out = f"{curve['held_out'][-1][1]:.3f}" if curve["held_out"] else ""
        rows.append(f"| {name} | {len(losses)} | {losses[0]:.3f} | {mean:.3f} | {held_out} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
