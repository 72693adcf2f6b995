"""The main job, stage by stage, each in a directory of its own under one output directory."""

import json
import time
from collections.abc import Callable
from typing import Any

from falcon_bridge.demo.result import Check, DemoResult, DemoSettings
from falcon_bridge.errors import JobError
from falcon_bridge.ranks import run_ranks


Progress = Callable[[str, int, int, str], None]
"""Called with a stage's name, steps done, steps in all and a remark."""

STAGES = (
    "text and tokenizer",
    "HF checkpoint",
    "import to Megatron",
    "train",
    "resume",
    "export to HF",
    "check in transformers",
    "sample and plot",
)
MAX_LOGIT_DIFFERENCE = 1e-4
MAX_LOSS_DIFFERENCE = 1e-5
PROMPT = "The following"


def run_demo(settings: DemoSettings, progress: Progress = lambda stage, done, total, note: None) -> DemoResult:
    """Run all stages.

    Args:
        settings: how large, and where.
        progress: told of every step.

    Raises:
        JobError: a stage failed. A check that does not hold is not an error: see `DemoResult.ok`.
    """
    started = time.monotonic()
    out, result = settings.out, DemoResult()
    corpus, tokenizer = _prepare_text(settings, result, progress)
    _import(settings, tokenizer, result, progress)
    _train(settings, result, progress)
    _export(settings, progress)
    _prove(settings, corpus, tokenizer, result, progress)
    _finish(settings, result, progress)
    result.figures |= {"out": str(out), "seconds": round(time.monotonic() - started, 1)}
    (out / "summary.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    return result


def _prepare_text(settings: DemoSettings, result: DemoResult, progress: Progress):
    from falcon_bridge.demo.text import python_reference, train_tokenizer, write_indexed_dataset

    progress(STAGES[0], 0, 3, "the Python language reference, from this Python")
    corpus = python_reference()
    tokenizer = train_tokenizer(corpus.train, settings.vocab_size, settings.out / "hf_initial", 1024)
    progress(STAGES[0], 1, 3, "importing Megatron, up to 30 s")
    from falcon_bridge.training.run import preload

    preload()
    data = settings.out / "data"
    data.mkdir()
    progress(STAGES[0], 2, 3, "writing Megatron's indexed dataset")
    trained = write_indexed_dataset(corpus.train, tokenizer, data / "train")
    held_out = write_indexed_dataset(corpus.held_out, tokenizer, data / "held_out")
    progress(STAGES[0], 3, 3, f"{trained:,} tokens to learn from, {held_out:,} held out")
    result.figures |= {"vocab_size": len(tokenizer), "train_tokens": trained, "held_out_tokens": held_out}
    return corpus, tokenizer


def _import(settings: DemoSettings, tokenizer, result: DemoResult, progress: Progress) -> None:
    from falcon_bridge.conversion.importer import import_checkpoint
    from falcon_bridge.demo.checkpoint import write_initial_checkpoint
    from falcon_bridge.verification.layout import ParallelLayout

    hf = settings.out / "hf_initial"
    progress(STAGES[1], 0, 1, "")
    parameters = write_initial_checkpoint(hf, tokenizer, settings.seed, 1024)
    result.figures["parameters"] = parameters
    progress(STAGES[1], 1, 1, f"{parameters:,} parameters, random weights")
    imported = import_checkpoint(
        hf,
        settings.out / "megatron_initial",
        ParallelLayout(),
        progress=lambda stage, done, total: stage == "converting" and progress(STAGES[2], done, total, ""),
    )
    progress(STAGES[2], 3, 3, f"{len(imported.tensors)} tensors")


def training_config(settings: DemoSettings):
    """The tiny recipe with the demo's model, data and directories.

    Returns:
        A ``ConfigContainer``; its learning rate schedule spans both runs.
    """
    from falcon_bridge.training.recipe import load_recipe, use_hf_model

    out, total = settings.out, settings.steps + settings.resume_steps
    cfg = load_recipe("falcon_h1_tiny_cpu_pretrain_config")
    use_hf_model(cfg, out / "hf_initial", pretrained=out / "megatron_initial")
    cfg.rng.seed = cfg.dataset.random_seed = settings.seed
    cfg.train.train_iters = cfg.scheduler.lr_decay_iters = total
    cfg.scheduler.lr_wsd_decay_iters = max(1, total // 3)
    cfg.scheduler.lr_warmup_iters = min(cfg.scheduler.lr_warmup_iters, total // 4)
    cfg.dataset.blend, cfg.dataset.split = None, None
    splits = [([str(out / "data" / name)], None) for name in ("train", "held_out", "held_out")]
    cfg.dataset.blend_per_split = splits
    cfg.dataset.path_to_cache = str(out / "data" / "cache")
    cfg.validation.eval_interval, cfg.validation.eval_iters = total + 1, 0
    cfg.checkpoint.save = cfg.checkpoint.load = str(out / "megatron")
    cfg.checkpoint.save_interval = settings.steps
    return cfg


def _train(settings: DemoSettings, result: DemoResult, progress: Progress) -> None:
    from falcon_bridge.training.run import run_pretrain

    for stage, first, steps in (
        (STAGES[3], 0, settings.steps),
        (STAGES[4], settings.steps, settings.resume_steps),
    ):
        cfg = training_config(settings)
        cfg.train.train_iters = first + steps
        progress(stage, 0, steps, "")
        begun, tokens = time.monotonic(), cfg.train.global_batch_size * cfg.dataset.seq_length

        def on_event(rank: int, event: Any, stage=stage, first=first, steps=steps) -> None:
            if hasattr(event, "grad_norm") and event.loss is not None:
                result.steps.append(event)
                progress(stage, event.iteration - first, steps, f"loss {event.loss:.3f}")

        run_pretrain(cfg, on_event=on_event)
        taken = time.monotonic() - begun
        result.figures[f"{stage}_seconds"] = round(taken, 1)
        result.figures[f"{stage}_tokens_seen"] = tokens * steps
    _check_training(settings, result)


def _check_training(settings: DemoSettings, result: DemoResult) -> None:
    steps, split = result.steps, settings.steps
    expected = list(range(1, split + settings.resume_steps + 1))
    found = [step.iteration for step in steps]
    if found != expected:
        raise JobError(f"training reported steps {found[:1]} to {found[-1:]} instead of 1 to {expected[-1]}")
    window = max(1, min(10, split // 4, settings.resume_steps))
    start = steps[0].loss
    before = _mean(steps[split - window : split])
    expected_next = 2 * before - _mean(steps[split - 2 * window : split - window])  # the same slope once more
    resumed, end = _mean(steps[split : split + window]), _mean(steps[-window:])
    result.figures |= {"loss_start": start, "loss_before_resume": before, "loss_resumed": resumed, "loss_end": end}
    result.checks += [
        Check(
            "the training loss falls well below the start",
            end <= start - settings.loss_drop and not any(step.skipped for step in steps),
            f"{start:.3f} → {end:.3f}",
        ),
        Check(
            "the resumed run goes on where the first one stopped",
            abs(resumed - expected_next) <= 0.1 * (start - before) + 0.1,
            f"{before:.3f} before, {resumed:.3f} after, at step {split}",
        ),
    ]


def _mean(steps: list) -> float:
    return sum(step.loss for step in steps) / len(steps)


def _export(settings: DemoSettings, progress: Progress) -> None:
    from falcon_bridge.conversion.exporter import export_checkpoint
    from falcon_bridge.verification.layout import ParallelLayout

    exported = export_checkpoint(
        settings.out / "megatron",
        settings.out / "hf_trained",
        ParallelLayout(),
        progress=lambda stage, done, total: stage == "exporting" and progress(STAGES[5], done, total, ""),
    )
    progress(STAGES[5], exported.tensors, exported.tensors, f"{exported.tensors} tensors, step {exported.iteration}")


def _prove(settings: DemoSettings, corpus, tokenizer, result: DemoResult, progress: Progress) -> None:
    from falcon_bridge.conversion.megatron_checkpoint import find_megatron_checkpoint
    from falcon_bridge.demo import proof

    out = settings.out
    tokens = proof.held_out_rows(corpus.held_out, tokenizer, settings.held_out_rows, settings.held_out_length)
    progress(STAGES[6], 0, 3, "the trained model in Megatron")
    checkpoint = find_megatron_checkpoint(out / "megatron")
    megatron = run_ranks(proof.megatron_outcome_on_rank, 1, checkpoint.iteration_dir, out / "hf_trained", tokens)[0]
    progress(STAGES[6], 1, 3, "the exported model in transformers")
    exported = proof.transformers_outcome(out / "hf_trained", tokens)
    progress(STAGES[6], 2, 3, "the initial model in transformers")
    initial = proof.transformers_outcome(out / "hf_initial", tokens)
    difference = (exported.logits - megatron.logits).abs().max().item()
    loss_difference = abs(exported.loss - megatron.loss)
    progress(STAGES[6], 3, 3, f"max |Δlogit| {difference:.1e}")
    result.figures |= {
        "max_abs_logit_diff": difference,
        "max_abs_logit": exported.logits.abs().max().item(),
        "held_out_loss_megatron": megatron.loss,
        "held_out_loss_transformers": exported.loss,
        "held_out_loss_initial": initial.loss,
    }
    result.checks += [
        Check(
            "stock transformers gives the logits of Megatron",
            difference <= MAX_LOGIT_DIFFERENCE,
            f"max |Δlogit| {difference:.2e} of {MAX_LOGIT_DIFFERENCE:.0e} allowed, fp32",
        ),
        Check(
            "and the same loss on held-out text",
            loss_difference <= MAX_LOSS_DIFFERENCE,
            f"{exported.loss:.6f} and {megatron.loss:.6f}",
        ),
        Check(
            "which is well below that of the initial model",
            exported.loss <= initial.loss - settings.loss_drop / 2,
            f"{initial.loss:.3f} → {exported.loss:.3f}",
        ),
    ]


def _finish(settings: DemoSettings, result: DemoResult, progress: Progress) -> None:
    from falcon_bridge.demo.plot import plot_losses
    from falcon_bridge.demo.proof import sample_text

    progress(STAGES[7], 0, 2, "sampling in transformers")
    result.sample = sample_text(settings.out / "hf_trained", PROMPT, settings.seed, settings.sample_tokens)
    (settings.out / "sample.txt").write_text(result.sample + "\n")
    progress(STAGES[7], 1, 2, "")
    curve = settings.out / "loss_curve.png"
    plot_losses(result.steps, settings.steps, result.figures["held_out_loss_transformers"], curve)
    result.figures["loss_curve"] = str(curve)
    progress(STAGES[7], 2, 2, curve.name)
