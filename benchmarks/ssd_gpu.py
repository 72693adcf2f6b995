"""The SSD scan on a GPU, kernel by kernel: ours beside mamba-ssm's, at the sizes of `training_step.py`.

Kernels are timed in CUDA graphs, that is, without the host. `--tune` times the launch configurations in CANDIDATES as
well and prints the fastest first; they are compiled by many processes before, since one kernel takes seconds.

    python -m benchmarks.ssd_gpu --json ssd.json
    python -m benchmarks.ssd_gpu --size 0.5B --tune
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


SIZES = {
    "0.5B": {"batch": 4, "heads": 24, "head_dim": 64, "d_state": 128, "mamba_chunk": 128},
    "1.5B": {"batch": 2, "heads": 48, "head_dim": 64, "d_state": 256, "mamba_chunk": 256},
    "7B": {"batch": 2, "heads": 24, "head_dim": 128, "d_state": 256, "mamba_chunk": 256},
}
LENGTH = 4096


def grid(**options: tuple) -> list[dict[str, Any]]:
    """All combinations of options."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "step_decay": grid(heads=(4, 8, 16), num_warps=(2, 4, 8)),
    "step_gradients": grid(heads=(4, 8, 16), num_warps=(4, 8)),
    "chunk_states": [
        *grid(BLOCK_N=(32, 64), STAGES=(2, 3), num_warps=(4,)),
        *grid(BLOCK_N=(64,), STAGES=(2,), num_warps=(4,), maxnreg=(168,)),
        *grid(BLOCK_N=(128,), STAGES=(2, 3), num_warps=(4, 8)),
    ],
    "chunk_state_gradients": [
        *grid(BLOCK_N=(32, 64), STAGES=(2, 3), num_warps=(4,)),
        *grid(BLOCK_N=(64,), STAGES=(2,), num_warps=(4,), maxnreg=(168,)),
        *grid(BLOCK_N=(128,), STAGES=(2,), num_warps=(4, 8)),
    ],
    "chunk_outputs": [
        *grid(num_stages=(1, 2, 3), maxnreg=(None,)),
        *grid(num_stages=(1,), maxnreg=(128, 168)),
        *grid(num_stages=(1, 3), maxnreg=(None,), heads=(4, 6, 12, 24)),
        *grid(block_m=(128,), num_warps=(8,), maxnreg=(None,), num_stages=(2, 3)),
        *grid(block_m=(128,), num_warps=(8,), maxnreg=(None,), num_stages=(2,), heads=(6, 12)),
    ],
    "input_gradients": [
        *grid(block=(64,), num_warps=(4,), num_stages=(1, 2, 3)),
        *grid(block=(64,), num_warps=(4,), num_stages=(1, 2), heads=(6, 8, 24)),
        *grid(block=(128,), num_warps=(8,), num_stages=(1, 2)),
    ],
    "group_gradients": [
        *grid(block_m=(128,), block_n=(128,), num_stages=(2, 3, 4), one_launch=(True, False)),
        *grid(block_m=(128,), block_n=(128,), num_stages=(2,), maxnreg=(128,), one_launch=(True, False)),
        *grid(block_m=(64,), block_n=(128,), num_warps=(4,), num_stages=(2, 3)),
        *grid(block_m=(128,), block_n=(64,), maxnreg=(128,), num_stages=(2, 3)),
        *grid(block_m=(64, 128), block_n=(256,), num_stages=(2, 3)),
    ],
}


class Scan:
    """Random tensors of one size, and each kernel as a call without arguments but its launch configuration."""

    def __init__(self, size: str, chunk: int):
        from falcon_bridge.ops.ssd.kernels import decay, group_gradients, input_gradients, output, states

        self.sizes = SIZES[size]
        batch, heads, head_dim, d_state = (self.sizes[name] for name in ("batch", "heads", "head_dim", "d_state"))
        inner, heads_shape, state_shape = heads * head_dim, (heads, head_dim), (1, d_state)

        def rows(*widths: int) -> list[torch.Tensor]:
            row = torch.randn(LENGTH, batch, sum(widths), device="cuda", dtype=torch.bfloat16)
            return row.transpose(0, 1).split(widths, dim=-1)

        x, b, c = rows(inner, d_state, d_state)
        dx, db, dc = rows(inner, d_state, d_state)
        self.x, self.dx = x.unflatten(2, heads_shape), dx.unflatten(2, heads_shape)
        self.b, self.c, self.db, self.dc = (t.unflatten(2, state_shape) for t in (b, c, db, dc))
        self.dy = torch.randn(batch, LENGTH, *heads_shape, device="cuda", dtype=torch.bfloat16)
        self.raw_dt, self.draw_dt = rows(heads, inner)[0], rows(heads, inner)[0]
        self.dt_bias = torch.randn(heads, device="cuda") - 4
        self.a, self.d = -torch.rand(heads, device="cuda") * 8 - 1, torch.randn(heads, device="cuda")
        self.steps = self.raw_dt, 0.35, self.dt_bias, self.a, self.d, None, chunk
        x, b, c, dy, d, a = self.x, self.b, self.c, self.dy, self.d, self.a

        # each kernel once, for what the others read
        dt, sums = decay.step_decay(*self.steps[:4], chunk)
        entering = states.chunk_states(x, b, dt, sums, None)
        leaving, decay_grad = states.chunk_state_gradients(dy, c, sums, entering, None)
        out = torch.empty_like(dy)
        found = input_gradients.input_gradients(dy, x, b, c, dt, sums, leaving, d, None, self.dx)
        dscores, ddt, pair, key, dd = found
        query = group_gradients.group_gradients(
            dy, x, b, c, dt, sums, entering, leaving, dscores, None, self.db, self.dc
        )
        seen = ddt, pair, key, query, decay_grad, dd, dt, *self.steps[:3], a, self.draw_dt
        self.kernels: dict[str, Callable[..., Any]] = {
            "step_decay": lambda config=None: decay.step_decay(*self.steps[:4], chunk, config=config),
            "chunk_states": lambda config=None: states.chunk_states(x, b, dt, sums, None, config=config),
            "chunk_outputs": lambda config=None: output.chunk_outputs(
                x, b, c, dt, sums, entering, d, None, out, config=config
            ),
            "chunk_state_gradients": lambda config=None: states.chunk_state_gradients(
                dy, c, sums, entering, None, config=config
            ),
            "input_gradients": lambda config=None: input_gradients.input_gradients(
                dy, x, b, c, dt, sums, leaving, d, None, self.dx, config=config
            ),
            "group_gradients": lambda config=None: group_gradients.group_gradients(
                dy, x, b, c, dt, sums, entering, leaving, dscores, None, self.db, self.dc, config=config
            ),
            "step_gradients": lambda config=None: decay.step_gradients(*seen, config=config),
        }

    def whole(self, kernels) -> tuple[Callable, Callable]:
        """Forward and backward of a module with `scan_forward` and `scan_backward`."""
        y = kernels.scan_forward(self.x, self.b, self.c, *self.steps)
        written = {"dx": self.dx, "db": self.db, "dc": self.dc, "draw_dt": self.draw_dt}
        return (
            lambda: kernels.scan_forward(self.x, self.b, self.c, *self.steps),
            lambda: kernels.scan_backward(self.dy, y, self.x, self.b, self.c, *self.steps, **written),
        )


def microseconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of a call on the GPU, captured."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / repeats * 1e3)
    return sorted(times)[len(times) // 2]


def compare(size: str) -> dict[str, float]:
    """Microseconds of both, of the whole and of each of our kernels."""
    from falcon_bridge.ops.ssd import mamba_scan
    from falcon_bridge.ops.ssd.backend import default_chunk
    from falcon_bridge.ops.ssd.kernels import scan

    ours, theirs = Scan(size, default_chunk(2)), Scan(size, SIZES[size]["mamba_chunk"])
    found = {}
    for name, one, kernels in (("falcon_bridge", ours, scan), ("mamba-ssm", theirs, mamba_scan)):
        for direction, call in zip(("forward", "backward"), one.whole(kernels), strict=True):
            found[f"{direction}, {name}"] = microseconds(call)
    return found | {name: microseconds(call) for name, call in ours.kernels.items()}


def tune(size: str, share: tuple[int, int] | None = None) -> dict[str, list]:
    """Microseconds of each candidate, fastest first; with a share (i, n), launch every n-th once to compile it."""
    from falcon_bridge.ops.ssd.backend import default_chunk

    one, found = Scan(size, default_chunk(2)), {}
    numbered = itertools.count()
    for name, candidates in CANDIDATES.items():
        found[name] = []
        for config in candidates:
            if share and next(numbered) % share[1] != share[0]:
                continue
            try:
                if share:
                    one.kernels[name](config)
                    torch.cuda.synchronize()
                else:
                    found[name].append((microseconds(partial(one.kernels[name], config)), config))
            except Exception as error:
                # configurations that do not fit, of which Triton and its compilers say so in many ways
                print(f"{size} {name} {config}: {type(error).__name__} {str(error)[:90]}", flush=True)
        found[name].sort(key=lambda pair: pair[0])
    return found


def compile_candidates(size: str, processes: int) -> None:
    """Fill Triton's cache."""
    command = [sys.executable, "-m", "benchmarks.ssd_gpu", "--size", size, "--share"]
    started = [subprocess.Popen([*command, f"{i}/{processes}"], stdout=subprocess.DEVNULL) for i in range(processes)]
    for process in started:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=list(SIZES))
    parser.add_argument("--tune", action="store_true")
    cores = max(1, (os.cpu_count() or 2) - 2)
    parser.add_argument("--processes", type=int, default=cores, help="that compile for --tune; 0: none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for size in arguments.size or SIZES:
        if arguments.share:
            share, processes = map(int, arguments.share.split("/"))
            tune(size, (share, processes))
            continue
        if arguments.tune:
            compile_candidates(size, arguments.processes)
            results[f"{size}, tuned"] = tune(size)
            for name, timed in results[f"{size}, tuned"].items():
                for time, config in timed[:4]:
                    print(f"{size} {name} {time:7.1f} µs {config}", flush=True)
        results[size] = compare(size)
        for name, time in results[size].items():
            print(f"{size} {name:26} {time:7.1f} µs", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
