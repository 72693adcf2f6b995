"""How long the first training step takes from a fresh process, and what of it is compiling and tuning.

Every mode is a fresh process. "cold" begins with empty Triton and inductor caches, "warm" with those that the cold one
of the same tuning left. "none" scans with our kernels, which have fixed configurations; "shipped" and "autotune" with
mamba-ssm's, whose configurations are those of the shipped table, or all timed.
Seconds of each stage, beside them how many Triton kernels were compiled, how many configurations were timed, and what
torch.compile took; Triton's and torch.compile's seconds are parts of the stages', not additions.

    python benchmarks/first_step.py --size 0.5B
    python benchmarks/first_step.py --size 1.5B --tuning none --tuning shipped --json first_step.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


BORN = time.perf_counter()
SIDES = {
    "none": "falcon_bridge",
    "shipped": "falcon_bridge, mamba_ssm",
    "autotune": "falcon_bridge, mamba_ssm",
}
"""Of `training_step.py`, by tuning."""
STAGES = ("import", "build", "first forward", "first backward", "first optimizer step", "second step")


class Compilations:
    """Counts what Triton and torch.compile do in this process."""

    def __init__(self):
        import triton
        from triton.runtime import Autotuner

        self.compiled, self.compile_s, self.from_disk, self.timed, self.timing_s = [], 0.0, 0, 0, 0.0
        triton.knobs.compilation.listener = self._on_compilation
        bench = Autotuner._bench

        def counted(autotuner, *args, **kwargs):
            started = time.perf_counter()
            try:
                return bench(autotuner, *args, **kwargs)
            finally:
                self.timed += 1
                self.timing_s += time.perf_counter() - started

        Autotuner._bench = counted

    def _on_compilation(self, *, src, metadata, metadata_group, times, cache_hit) -> None:
        if cache_hit:
            self.from_disk += 1
            return
        seconds = times.total / 1e6
        self.compiled.append((src.name, round(seconds, 3)))
        self.compile_s += seconds

    def figures(self) -> dict:
        from torch._dynamo.utils import compile_times

        names, seconds = compile_times("csv")
        torch_compile = dict(zip(names, seconds, strict=True)).get("_compile.compile_inner", "")
        graphs = [float(value) for value in torch_compile.split(",") if value.strip()]
        return {
            "triton_compiled": len(self.compiled),
            "triton_compile_s": self.compile_s,
            "triton_from_disk": self.from_disk,
            "configurations_timed": self.timed,
            "timing_s": self.timing_s,
            "torch_compile_graphs": len(graphs),
            "torch_compile_s": sum(graphs),
            "slowest_compilations": sorted(self.compiled, key=lambda entry: -entry[1])[:12],
        }


def measure(size: str, seq_length: int, side: str) -> dict:
    stages, last = {}, BORN

    def stage(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        stages[name], last = now - last, now

    import torch
    from training_step import BATCH, SHAPES, build

    import falcon_bridge.models.falcon_h1.provider  # noqa: F401

    stage("import")
    compilations = Compilations()
    torch.manual_seed(0)
    torch.cuda.set_device(0)
    tokens = torch.randint(0, SHAPES[size]["vocab_size"], (BATCH[size], seq_length), device="cuda")
    model, loss_of = build(side, size, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.cuda.synchronize()
    stage("build")
    loss = loss_of()
    torch.cuda.synchronize()
    stage("first forward")
    loss.backward()
    torch.cuda.synchronize()
    stage("first backward")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    stage("first optimizer step")
    loss_of().backward()
    optimizer.step()
    torch.cuda.synchronize()
    stage("second step")
    return {"size": size, "loss": loss.item(), "stages_s": stages, **compilations.figures()}


def in_fresh_process(size: str, seq_length: int, tuning: str, caches: Path) -> dict:
    environment = {
        **os.environ,
        "FALCON_BRIDGE_TUNING": "shipped" if tuning == "none" else tuning,
        "MAMBA_DETERMINISTIC": "0",
        "NVTE_DEBUG": "0",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    command = [sys.executable, __file__, "--one", size, str(seq_length), SIDES[tuning]]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not lines:
        raise SystemExit(f"{size} {tuning} failed:\n{(run.stderr or run.stdout)[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def line(result: dict) -> str:
    stages = result["stages_s"]
    first = sum(stages[name] for name in STAGES[2:5])
    return (
        f"{result['size']} {result['tuning']} {result['caches']}: first step {first:.1f} s; "
        + ", ".join(f"{name} {stages[name]:.2f}" for name in STAGES)
        + f"; Triton compiled {result['triton_compiled']} in {result['triton_compile_s']:.1f} s, timed "
        f"{result['configurations_timed']} in {result['timing_s']:.1f} s; torch.compile "
        f"{result['torch_compile_graphs']} graphs in {result['torch_compile_s']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=("0.5B", "1.5B"), help="0.5B")
    parser.add_argument("--tuning", action="append", choices=list(SIDES), help="none")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        size, seq_length, side = arguments.one
        print("RESULT", json.dumps(measure(size, int(seq_length), side)))
        return
    results = []
    for size in arguments.size or ("0.5B",):
        for tuning in arguments.tuning or ("none",):
            with tempfile.TemporaryDirectory() as caches:
                for state in ("cold", "warm"):
                    result = in_fresh_process(size, arguments.seq_length, tuning, Path(caches))
                    results.append({**result, "tuning": tuning, "caches": state})
                    if arguments.json:
                        arguments.json.write_text(json.dumps(results, indent=1))
                    print(line(results[-1]), flush=True)


if __name__ == "__main__":
    main()
