"""Writes a tuning table: the fastest configuration of mamba-ssm's kernels for the released sizes on this GPU.

Runs the SSM branch of every size once forward and backward under Triton's autotuner, in bf16 and fp32, on whole and on
packed rows. All configurations are compiled first, by several processes at once: that is most of the time. An existing
table keeps its other choices.

    python benchmarks/tune_ssm.py --out falcon_bridge/ops/tuning/sm90.json
    python benchmarks/tune_ssm.py --out my_gpu.json --dtype bf16 --rows whole
    FALCON_BRIDGE_TUNING=my_gpu.json falcon-bridge train ...
"""

import argparse
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


SEQ_LENGTH, BATCH = 4096, 2
DOCUMENTS = (1800, 296, 1000, 1000)
ROWS = ("whole", "packed")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Shape:
    """What the kernels' autotuning keys see of a model."""

    chunk_size: int
    head_dim: int
    state: int
    heads: int


@dataclass(frozen=True)
class Job:
    shape: Shape
    dtype: str
    rows: str


def released_shapes() -> dict[str, Shape]:
    """By size; the number of groups is no part of a key."""
    from training_step import SHAPES

    from falcon_bridge.models.falcon_h1 import sizes

    found = {
        name.removeprefix("FalconH1ModelProvider"): Shape(
            provider.chunk_size, provider.mamba_head_dim, provider.mamba_state_dim, provider.mamba_num_heads
        )
        for name, provider in vars(sizes).items()
        if name.startswith("FalconH1ModelProvider") and name != "FalconH1ModelProvider"
    }
    for name, shape in SHAPES.items():
        keys = (shape[key] for key in ("chunk_size", "mamba_head_dim", "mamba_state_dim", "mamba_num_heads"))
        found[f"training_step {name}"] = Shape(*keys)
    return found


def different(shapes: Iterable[Shape]) -> list[Shape]:
    """Those that add a key: most kernels are tuned for chunk, head_dim and state, some for chunk and heads."""
    kept, seen = [], set()
    for shape in sorted(shapes, key=lambda shape: shape.heads, reverse=True):
        keys = {(shape.chunk_size, shape.head_dim, shape.state), (shape.chunk_size, shape.heads)}
        if keys - seen:
            kept.append(shape)
            seen |= keys
    return kept


def jobs(arguments: argparse.Namespace) -> list[Job]:
    shapes = released_shapes()
    if unknown := sorted(set(arguments.size or ()) - set(shapes)):
        raise SystemExit(f"--size {unknown[0]!r} is none of {', '.join(shapes)}")
    chosen = different(shapes[name] for name in arguments.size or shapes)
    rows, dtypes = arguments.rows or ROWS, arguments.dtype or DTYPES
    return [Job(shape, dtype, row) for row in rows for dtype in dtypes for shape in chosen]


def branch(job: Job):
    """The SSM branch of a layer, as a training job builds it, behind few hidden channels."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    from falcon_bridge import FalconH1ModelProvider
    from falcon_bridge.models.falcon_h1.layer_specs import falcon_h1_layer_spec

    dtype = getattr(torch, DTYPES[job.dtype])
    config = FalconH1ModelProvider(
        num_layers=1,
        hidden_size=256,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=64,
        ffn_hidden_size=256,
        vocab_size=128,
        mamba_num_heads=job.shape.heads,
        mamba_head_dim=job.shape.head_dim,
        mamba_state_dim=job.shape.state,
        mamba_num_groups=1,
        chunk_size=job.shape.chunk_size,
        ssm_backend="mamba_ssm",
        ssm_in_multiplier=1.25,
        ssm_multipliers=(0.35, 0.25, 0.18, 0.5, 0.4),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
    )
    config.finalize()
    spec = falcon_h1_layer_spec(config).submodules.self_attention.submodules.mamba_mixer
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return spec.module(config, spec.submodules, layer_number=1, pg_collection=groups).cuda()


def run_once(job: Job) -> None:
    """Forward and backward of one branch on random input."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    torch.manual_seed(0)
    module = branch(job)
    packed, batch = None, BATCH
    if job.rows == "packed":
        borders = torch.tensor([0, *DOCUMENTS], device="cuda").cumsum(0).to(torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=max(DOCUMENTS),
            max_seqlen_kv=max(DOCUMENTS),
        )
        batch = 1
    hidden = torch.randn(SEQ_LENGTH, batch, 256, device="cuda", dtype=getattr(torch, DTYPES[job.dtype]))
    output, _ = module(hidden.requires_grad_(), packed)
    output.sum().backward()
    torch.cuda.synchronize()


def start(do_bench: Callable) -> None:
    """Make this process a rank whose kernels are timed by `do_bench`."""
    from training_step import start_one_rank

    from falcon_bridge.ops.tuning.shipped import mamba_ssm_kernels

    start_one_rank()
    for kernel in mamba_ssm_kernels().values():
        kernel.do_bench = do_bench


def only_compile(call: Callable[[], None], quantiles) -> list[float]:
    call()
    return [0.0] * len(quantiles)


def compile_all(job: Job) -> Job:
    """Put all configurations that a job tries into Triton's cache on disk."""
    run_once(job)
    return job


def measured_table():
    """What the autotuners of this process have chosen."""
    import torch
    import triton

    from falcon_bridge.ops.tuning.shipped import mamba_ssm_kernels
    from falcon_bridge.ops.tuning.table import CallKey, KernelTable, TuningTable

    table = TuningTable(
        {
            "gpu": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "mamba_ssm": version("mamba_ssm"),
            "date": time.strftime("%Y-%m-%d"),
        }
    )
    for name, kernel in mamba_ssm_kernels().items():
        if kernel.cache:
            names = len(kernel.keys)
            chosen = {CallKey.from_triton(key, names): config.all_kwargs() for key, config in kernel.cache.items()}
            table.kernels[name] = KernelTable(tuple(kernel.keys), chosen)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the table; choices that it has already are kept")
    parser.add_argument("--size", action="append", help="of sizes.py (500M, 7B, …), or 'training_step 1.5B'; all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="both")
    parser.add_argument("--rows", action="append", choices=ROWS, help="both")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1), help="that compile at once")
    arguments = parser.parse_args()
    # every choice is to be measured, and none of it to be found on disk
    os.environ.update(FALCON_BRIDGE_TUNING="autotune", MAMBA_DETERMINISTIC="0", TRITON_CACHE_AUTOTUNING="0")

    from triton.testing import do_bench

    from falcon_bridge.ops.tuning.table import TuningTable

    table = TuningTable.read(arguments.out) if arguments.out.exists() else TuningTable()
    todo = jobs(arguments)
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as kept,
        ProcessPoolExecutor(
            min(arguments.processes, len(todo)), multiprocessing.get_context("spawn"), start, (only_compile,)
        ) as pool,
    ):
        os.environ.setdefault("TRITON_CACHE_DIR", kept)
        for job in pool.map(compile_all, todo):
            print(f"{time.perf_counter() - started:5.0f} s compiled {job}", flush=True)
        start(functools.partial(do_bench, warmup=5, rep=25))
        for job in todo:
            run_once(job)
            print(f"{time.perf_counter() - started:5.0f} s timed {job}", flush=True)
        table.merge(measured_table())
    table.write(arguments.out)
    choices = sum(len(kernel.choices) for kernel in table.kernels.values())
    print(f"{arguments.out}: {choices} choices of {len(table.kernels)} kernels")


if __name__ == "__main__":
    main()
