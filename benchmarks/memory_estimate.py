"""The memory estimate of `falcon-bridge train --dry-run` against measured peaks of real training steps on one GPU.

Each case builds the provider of a size, Megatron's distributed data parallel wrapper and its distributed optimizer in
a process of its own, and takes two steps of forward, backward, gradient finalisation and optimizer through Megatron's
schedule. The peaks are those of the second: the first autotunes kernels. Random tokens.

    TRITON_CACHE_AUTOTUNING=1 python -m benchmarks.memory_estimate --out memory.json
    python -m benchmarks.memory_estimate --case 500M:4096:4 --case 500M:4096:4:recompute_mixer=true --modules
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.processes import answer, run_each, write_json


CASES = [
    "500M:4096:4",
    "500M:4096:4:recompute_mixer=true",
    "1P5B:4096:2",
    "1P5B:4096:2:recompute_mixer=true",
]
GIB = 2**30


def parse_case(text: str) -> tuple[str, int, int, dict]:
    """``SIZE:SEQ_LENGTH:MICRO_BATCH[:FIELD=JSON]...``."""
    size, seq_length, rows, *fields = text.split(":")
    return size, int(seq_length), int(rows), {k: json.loads(v) for k, v in (f.split("=", 1) for f in fields)}


def build(size: str, seq_length: int, rows: int, fields: dict) -> SimpleNamespace:
    """What the estimator reads of a ConfigContainer, as the pretraining recipes set it, without Bridge's recipes."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    import falcon_bridge

    model = getattr(falcon_bridge, f"FalconH1ModelProvider{size}")(
        seq_length=seq_length, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, **fields
    )
    model.finalize()
    return SimpleNamespace(
        model=model,
        mixed_precision=None,
        peft=None,
        train=SimpleNamespace(micro_batch_size=rows, global_batch_size=rows),
        dataset=SimpleNamespace(seq_length=seq_length),
        validation=SimpleNamespace(eval_iters=0),
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, average_in_collective=True
        ),
        optimizer=OptimizerConfig(
            optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
        ),
    )


class Step:
    """Training steps of a case."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.utils import get_model_config

        self.cfg = cfg
        self.model = cfg.model.provide_distributed_model(ddp_config=cfg.ddp, data_parallel_random_init=False)
        self.built = torch.cuda.memory_allocated()
        self.optimizer = get_megatron_optimizer(cfg.optimizer, self.model)
        config = get_model_config(self.model[0])
        config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, self.optimizer.scale_loss
        rows, seq_length = cfg.train.micro_batch_size, cfg.model.seq_length
        tokens = torch.randint(1, cfg.model.vocab_size, (rows, seq_length + 1), device="cuda")
        self.batch = {
            "input_ids": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": torch.arange(seq_length, device="cuda")[None].repeat(rows, 1),
            "attention_mask": None,
        }

    def forward_step(self, batches, model):
        def loss(output):
            total = output.view(-1).float().sum()
            tokens = torch.tensor(output.numel(), dtype=torch.int, device="cuda")
            return total / tokens, {"loss": total.detach() / tokens}

        return model(**next(batches)), loss

    def forward_backward(self, length: int | None = None) -> float:
        """The loss, of the first `length` tokens of each row or of all."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=iter([{name: x if x is None else x[:, :length] for name, x in self.batch.items()}]),
            model=self.model[0],
            num_microbatches=1,
            seq_length=length or self.cfg.model.seq_length,
            micro_batch_size=self.cfg.train.micro_batch_size,
            forward_only=False,
        )
        return losses[0]["loss"].item()

    def saved(self):
        """What one forward pass saves, and by how much it grows the allocated memory."""
        from falcon_bridge.training.saved_tensors import SavedTensors

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with SavedTensors(self.model[0]) as saved:
            output = self.model[0](**self.batch)
        grown = torch.cuda.memory_allocated() - before
        del output
        return saved, grown


def peak_of(call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@contextmanager
def one_rank() -> Iterator[None]:
    """One NCCL rank with Megatron's model-parallel groups."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as store:
        torch.cuda.set_device(0)
        torch.distributed.init_process_group("nccl", init_method=f"file://{store}/file", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def measure(case: str, figures: dict) -> None:
    """Fill `figures` with the bytes that a case takes; call it once a process."""
    size, seq_length, rows, fields = parse_case(case)
    cfg = build(size, seq_length, rows, fields)
    figures |= {"implementation": cfg.model.transformer_impl, "device": torch.cuda.get_device_name()}
    figures["estimate"] = estimate(cfg)
    step = Step(cfg)
    figures["model_and_gradients"] = step.built
    figures["loss"] = step.forward_backward()
    step.optimizer.step()
    figures["state"] = torch.cuda.memory_allocated()
    figures["peak_forward_backward"] = peak_of(step.forward_backward)
    figures["peak_optimizer"] = peak_of(step.optimizer.step)
    figures["peak"] = max(figures["peak_forward_backward"], figures["peak_optimizer"])
    figures["peak_reserved"] = torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    figures["outside_the_allocator"] = total - free - torch.cuda.memory_reserved()
    saved, figures["forward_growth"] = step.saved()
    figures["saved"] = saved.total
    figures["saved_by_module"] = saved.by_module()
    figures["saved_in_a_layer"] = _listed(t for t in saved.tensors if "layers.1." in f"{t.module}.")
    figures["saved_elsewhere"] = _listed(t for t in saved.tensors if ".layers." not in t.module)


def in_one_rank(case: str, figures: dict) -> None:
    with one_rank():
        measure(case, figures)


def _listed(tensors) -> list[list]:
    return [
        [t.module.split("layers.1")[-1], *map(str, (list(t.shape), t.dtype)), t.storage_bytes, t.new] for t in tensors
    ]


def estimate(cfg: SimpleNamespace) -> dict:
    from falcon_bridge.training.memory import estimate_memory

    (stage,) = estimate_memory(cfg, 1)
    return stage.as_dict()


def parts(figures: dict) -> list[tuple[str, int, int]]:
    """Name, estimated and measured bytes of the parts of a case's peak; they add up to the last."""
    estimated = figures["estimate"]
    built = estimated["weights"] + estimated["gradients"]
    rows = [
        ("weights and gradients", built, figures["model_and_gradients"]),
        ("optimizer", estimated["optimizer"], figures["state"] - figures["model_and_gradients"]),
        # the second figure has what the loss keeps, which the estimate counts with the workspace
        ("kept for backward", estimated["activations"], figures["saved"]),
        ("workspace", estimated["workspace"], figures["peak"] - figures["state"] - figures["saved"]),
    ]
    return [*rows, ("peak", estimated["peak"], figures["peak"])]


def show(results: list[dict], modules: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console, table = Console(width=130), Table(title="GiB on one GPU, at the peak of a training step")
    for index, column in enumerate(("case", "part", "estimated", "measured", "estimated / measured")):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for figures in results:
        if "error" in figures:
            table.add_row(figures["case"], "failed, see above", end_section=True)
            continue
        rows = parts(figures)
        for index, (name, estimated, measured) in enumerate(rows):
            ratio = f"{estimated / measured:.3f}" if measured > 0 else ""
            cells = (f"{estimated / GIB:.2f}", f"{measured / GIB:.2f}", ratio)
            table.add_row("" if index else figures["case"], name, *cells)
        held = figures["peak_reserved"] - figures["peak"], figures["outside_the_allocator"]
        for name, measured in zip(("held beyond the peak", "outside torch's allocator"), held, strict=True):
            table.add_row("", name, "", f"{measured / GIB:.2f}", "", end_section=name.startswith("outside"))
    console.print(table)
    for figures in results if modules else []:
        show_modules(console, figures)


def show_modules(console, figures: dict) -> None:
    _, seq_length, rows, _ = parse_case(figures["case"])
    tokens = seq_length * rows
    console.print(f"\n{figures['case']}: saved for the backward pass, and in one layer", highlight=False)
    for name, value in figures.get("saved_by_module", {}).items():
        console.print(f"  {value / GIB:9.3f} GiB {value / tokens:12.1f} B/token  {name}", highlight=False)
    for module, shape, dtype, nbytes, new in figures.get("saved_in_a_layer", []):
        line = f"  {module:<40} {shape:<28} {dtype:<16} {nbytes / tokens:10.1f} {'new' if new else 'shared'}"
        console.print(line, highlight=False, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="SIZE:SEQ_LENGTH:MICRO_BATCH[:FIELD=JSON]...; repeatable")
    parser.add_argument("--modules", action="store_true", help="list what each module saves")
    parser.add_argument("--out", type=Path, help="JSON file for all figures, written after each case")
    parser.add_argument("--timeout", type=float, default=180, help="seconds that a case may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        from falcon_bridge import FalconH1ModelProvider  # noqa: F401  while another case computes

        answer(arguments.one, in_one_rank, torch.OutOfMemoryError)
        return
    results = []
    for figures in run_each("benchmarks.memory_estimate", arguments.case or CASES, timeout=arguments.timeout):
        results.append(figures)
        write_json(arguments.out, results)
        peak = figures.get("peak", 0) / GIB
        print(f"{figures['case']}: {figures.get('error') or f'peak {peak:.2f} GiB'}", flush=True)
    show(results, arguments.modules)


if __name__ == "__main__":
    main()
