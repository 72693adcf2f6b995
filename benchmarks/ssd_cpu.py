"""Falcon-H1's Mamba-2 mixer on CPU: transformers' torch path against ours, forward and backward.

Both sides are one `FalconH1Mixer` of transformers with the shape of Falcon-H1-Tiny-90M; ours takes the same module's
weights and replaces its convolution and scan by falcon_bridge's ops. Equality of outputs and all gradients is asserted
before anything is timed. Every figure is taken in a fresh process.

    python benchmarks/ssd_cpu.py compare --length 512 --length 2048
    python benchmarks/ssd_cpu.py sweep
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table


app = typer.Typer(add_completion=False, help=__doc__)
console = Console()

MIXER = {
    "vocab_size": 64,
    "hidden_size": 512,
    "mamba_d_ssm": 768,
    "mamba_n_heads": 24,
    "mamba_d_head": 32,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 128,
    "mamba_rms_norm": False,
    "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.4],  # Tiny's are 1; these make an unapplied one show
    "ssm_in_multiplier": 1.25,
}
SWEPT_SHAPES = {
    "Tiny-90M": (24, 32, 64),
    "0.5B": (24, 64, 128),
    "1.5B-Deep": (24, 64, 256),
}  # heads, head and state size
Side = Literal["transformers", "falcon_bridge"]


def build_mixer() -> torch.nn.Module:
    from transformers import FalconH1Config
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer, compute_mup_vector

    torch.manual_seed(0)
    config = FalconH1Config(**MIXER)
    mixer = FalconH1Mixer(config, layer_idx=0)
    mixer.register_buffer("mup_vector", compute_mup_vector(config), persistent=False)
    with torch.no_grad():
        # Mamba-2's own initialisation: A in [1, 16], steps log-uniform in [1e-3, 1e-1]
        mixer.A_log.copy_(torch.empty_like(mixer.A_log).uniform_(1, 16).log())
        steps = torch.exp(torch.empty_like(mixer.dt_bias).uniform_(-6.9, -2.3))
        mixer.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        mixer.D.normal_()
    return mixer


def our_forward(mixer: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    from falcon_bridge.ops.conv1d import causal_conv1d
    from falcon_bridge.ops.ssd import ssd_chunked

    b, length, _ = hidden_states.shape
    projected = mixer.in_proj(hidden_states * mixer.ssm_in_multiplier) * mixer.mup_vector
    gate, xBC, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    xBC = causal_conv1d(xBC, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
    x, B, C = xBC.split([mixer.intermediate_size] + 2 * [mixer.n_groups * mixer.ssm_state_size], dim=-1)
    y, _ = ssd_chunked(
        x.view(b, length, mixer.num_heads, mixer.head_dim),
        torch.nn.functional.softplus(dt + mixer.dt_bias),
        -torch.exp(mixer.A_log.float()),
        B.view(b, length, mixer.n_groups, mixer.ssm_state_size),
        C.view(b, length, mixer.n_groups, mixer.ssm_state_size),
        mixer.D,
    )
    return mixer.out_proj(y.flatten(2) * torch.nn.functional.silu(gate))


def step(side: Side, mixer: torch.nn.Module, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Forward and backward; return the output and every gradient."""
    for leaf in (hidden_states, *mixer.parameters()):
        leaf.grad = None
    forward = mixer.torch_forward if side == "transformers" else lambda h: our_forward(mixer, h)
    output = forward(hidden_states)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    grads = {f"d {name}": parameter.grad for name, parameter in mixer.named_parameters()}
    return {"output": output.detach(), "d input": hidden_states.grad} | grads


def make_input(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(1, length, MIXER["hidden_size"], generator=generator).requires_grad_()


def resident_mib(field: Literal["VmHWM", "VmRSS"]) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@app.command()
def check(length: int) -> None:
    """Print the largest difference of output and gradients, relative to each tensor's maximum; exit 1 over 1e-4."""
    mixer, hidden_states = build_mixer(), make_input(length)
    expected, actual = (step(side, mixer, hidden_states) for side in ("transformers", "falcon_bridge"))
    worst = {
        name: ((actual[name] - reference).abs().max() / reference.abs().max()).item()
        for name, reference in expected.items()
    }
    typer.echo(json.dumps(worst))
    if not all(difference <= 1e-4 for difference in worst.values()):
        raise typer.Exit(1)


@app.command()
def measure(side: str, length: int, threads: int, repeats: int) -> None:
    """Print as JSON the peak memory of one step above the set-up's, and the median wall and CPU seconds of the next.

    The peak is VmHWM after the step less VmRSS before it. CPU seconds count all threads, OpenMP's waiting ones too, so
    they compare the sides on a busy machine with one thread only.
    """
    torch.set_num_threads(threads)
    mixer, hidden_states = build_mixer(), make_input(length)
    step(side, mixer, make_input(8))
    before, peak_before = resident_mib("VmRSS"), resident_mib("VmHWM")
    step(side, mixer, hidden_states)
    peak = resident_mib("VmHWM")
    if peak <= peak_before:
        raise SystemExit(f"the step at length {length} needed less memory than the imports: nothing to measure")
    wall, cpu = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        step(side, mixer, hidden_states)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    typer.echo(json.dumps({"mib": peak - before, "wall_s": statistics.median(wall), "cpu_s": statistics.median(cpu)}))


def in_fresh_process(*arguments: object) -> dict:
    command = [sys.executable, __file__, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed: {result.stdout}{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def device() -> str:
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    return f"{model}, {os.cpu_count()} cores; torch {torch.__version__}; load {os.getloadavg()[0]:.1f} at the start"


@app.command()
def compare(
    length: Annotated[list[int], typer.Option(help="Sequence length; may be repeated.")] = [512, 1024, 2048],  # noqa: B006
    threads: Annotated[list[int], typer.Option(help="torch.set_num_threads; may be repeated.")] = [1, 2],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps a process, after one that is not.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Processes a figure, the two sides taking turns.")] = 2,
) -> None:
    """Check equality, then print time and peak memory of both sides and their ratio."""
    console.print(device())
    table = Table("length", "threads", "figure", "transformers", "falcon_bridge", "ratio")
    for tokens in length:
        worst = in_fresh_process("check", tokens)
        name = max(worst, key=worst.get)
        console.print(f"length {tokens}: equal; largest relative difference {worst[name]:.1e} ({name})")
        for count in threads:
            runs = {"transformers": [], "falcon_bridge": []}
            for _ in range(processes):
                for side, results in runs.items():
                    results.append(in_fresh_process("measure", side, tokens, count, repeats))
            for key, label in {"wall_s": "wall s", "cpu_s": "CPU s", "mib": "peak MiB"}.items():
                theirs, ours = (statistics.median(run[key] for run in results) for results in runs.values())
                table.add_row(str(tokens), str(count), label, f"{theirs:.4g}", f"{ours:.4g}", f"{theirs / ours:.1f}×")
    console.print(table)


@app.command()
def sweep(length: int = 2048, threads: int = 2, repeats: int = 5) -> None:
    """Print forward + backward milliseconds of ssd_chunked over chunk sizes and block sizes."""
    from falcon_bridge.ops.ssd import blocks, ssd_chunked

    torch.set_num_threads(threads)
    console.print(device())
    chunk_sizes = (16, 32, 64, 128)
    table = Table("shape", "block elements", *(f"chunk {size}" for size in chunk_sizes))
    for shape, (heads, head_dim, state_size) in SWEPT_SHAPES.items():
        torch.manual_seed(0)
        inputs = [
            torch.randn(1, length, heads, head_dim),
            torch.nn.functional.softplus(torch.randn(1, length, heads) - 3),
            -torch.empty(heads).uniform_(1, 16),
            torch.randn(1, length, 1, state_size),
            torch.randn(1, length, 1, state_size),
            torch.randn(heads),
        ]
        for tensor in inputs:
            tensor.requires_grad_()
        for power in (16, 17, 18, 19, 20):
            blocks._BLOCK_ELEMENTS = 1 << power
            cells = []
            for chunk_size in chunk_sizes:
                seconds = []
                for _ in range(repeats + 1):
                    start = time.perf_counter()
                    y, _ = ssd_chunked(*inputs, chunk_size=chunk_size)
                    torch.autograd.grad(y.sum(), inputs)
                    seconds.append(time.perf_counter() - start)
                cells.append(f"{statistics.median(seconds[1:]) * 1e3:.0f}")
            table.add_row(shape, f"2^{power}", *cells)
    console.print(table)


if __name__ == "__main__":
    app()
