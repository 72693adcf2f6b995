"""The memory estimate of `falcon-bridge train --dry-run` against measured peaks of real training steps on one GPU.

Each case builds the provider of a size, Megatron's distributed data parallel wrapper and its distributed optimizer,
and takes three steps of forward, backward, gradient finalisation and optimizer through Megatron's schedule. The peaks
are those after the first step, which autotunes kernels. Random tokens.

    TRITON_CACHE_AUTOTUNING=1 PYTHONPATH=$PWD python benchmarks/memory_estimate.py --out memory.json
    python benchmarks/memory_estimate.py --case 500M:4096:4 --case 500M:4096:4:recompute_mixer=true
"""

import argparse
import gc
import json
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch


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

    def forward_backward(self) -> float:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=iter([dict(self.batch)]),
            model=self.model[0],
            num_microbatches=1,
            seq_length=self.cfg.model.seq_length,
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


def run_case(text: str, layer: int) -> dict:
    size, seq_length, rows, fields = parse_case(text)
    torch.cuda.empty_cache()
    empty = torch.cuda.memory_allocated()
    cfg = build(size, seq_length, rows, fields)
    step = Step(cfg)
    figures = {"case": text, "implementation": cfg.model.transformer_impl, "before_the_model": empty}
    figures["model_and_gradients"] = step.built
    figures["with_main_weights"] = torch.cuda.memory_allocated()
    figures["loss"] = step.forward_backward()
    step.optimizer.step()
    figures["state"] = torch.cuda.memory_allocated()
    for _ in range(2):
        figures["peak_forward_backward"] = peak_of(step.forward_backward)
        figures["peak_optimizer"] = peak_of(step.optimizer.step)
    saved, figures["forward_growth"] = step.saved()
    figures["saved"] = saved.total
    figures["saved_by_module"] = saved.by_module()
    figures["saved_in_a_layer"] = [
        [t.module.split(f"layers.{layer}")[-1], *map(str, (list(t.shape), t.dtype)), t.storage_bytes, t.new]
        for t in saved.tensors
        if f"layers.{layer}." in f"{t.module}."
    ]
    figures["saved_elsewhere"] = [
        [t.module, *map(str, (list(t.shape), t.dtype)), t.storage_bytes, t.new]
        for t in saved.tensors
        if ".layers." not in t.module
    ]
    figures["estimate"] = estimate(cfg)
    del step, saved
    gc.collect()
    torch.cuda.empty_cache()
    return figures


def estimate(cfg: SimpleNamespace) -> dict:
    from falcon_bridge.training.memory import estimate_memory

    (stage,) = estimate_memory(cfg, 1)
    return stage.as_dict()


def show(figures: dict, tokens: int) -> None:
    print(f"\n== {figures['case']} ({figures['implementation']}), loss {figures['loss']:.3f}")
    peak, estimated = max(figures["peak_forward_backward"], figures["peak_optimizer"]), figures["estimate"]
    for name in ("model_and_gradients", "with_main_weights", "state", "peak_forward_backward", "peak_optimizer"):
        print(f"measured {name:<24} {figures[name] / GIB:9.3f} GiB")
    for name, value in estimated.items():
        print(f"estimate {name:<24} {value / GIB:9.3f} GiB")
    print(
        f"peak: measured {peak / GIB:.3f}, estimated {estimated['peak'] / GIB:.3f} GiB: {estimated['peak'] / peak:.4f}"
    )
    print(
        f"saved for the backward pass: {figures['saved'] / GIB:.3f} GiB; growth {figures['forward_growth'] / GIB:.3f}"
    )
    for name, value in figures["saved_by_module"].items():
        print(f"  {value / GIB:9.3f} GiB {value / tokens:12.1f} B/token  {name}")
    print("saved in one layer (module, shape, dtype, bytes a token of the storage, first to keep it):")
    for module, shape, dtype, nbytes, new in figures["saved_in_a_layer"]:
        print(f"  {module:<40} {shape:<28} {dtype:<16} {nbytes / tokens:10.1f} {'new' if new else 'shared'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="SIZE:SEQ_LENGTH:MICRO_BATCH[:FIELD=JSON]...; repeatable")
    parser.add_argument("--layer", type=int, default=1, help="layer whose saved tensors are listed")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    arguments = parser.parse_args()

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    import falcon_bridge  # noqa: F401

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as store:
        torch.cuda.set_device(0)
        torch.distributed.init_process_group("nccl", init_method=f"file://{store}/file", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        print(torch.cuda.get_device_name(), torch.__version__)
        results = []
        for case in arguments.case or CASES:
            figures = run_case(case, arguments.layer)
            _, seq_length, rows, _ = parse_case(case)
            show(figures, seq_length * rows)
            results.append(figures)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1))
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
