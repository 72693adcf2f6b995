"""Long rows on one GPU: the longest that fits, memory and time over length, and throughput at equal tokens a step.

Training steps through Megatron's schedule and distributed optimizer on random tokens, micro-batch 1, mixer and MLP
recomputed ("longest", "curve"; only memory is drawn, times are printed); and the whole steps of `training_step` on
32,768 tokens, nothing recomputed, beside transformers ("throughput"). Each point is a process of its own.

    TRITON_CACHE_AUTOTUNING=1 python -m benchmarks.long_context --json long.json --plot docs/images --deadline 360
    python -m benchmarks.long_context --case longest:500M --case curve:500M:SSM:65536
    python -m benchmarks.long_context --json long.json --plot docs/images --case none   # draw what the file has
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path

import torch

from benchmarks.memory_estimate import GIB, Step, build, estimate, one_rank
from benchmarks.processes import answer, run_each, write_json


RECOMPUTE = {
    "mixer, mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"], "recompute_mixer": True},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
PATTERNS = {"hybrid": "P", "SSM": "M", "attention": "*"}
MULTIPLE, WARM_UP, TOKENS = 4096, 4096, 32768
SIDES = ("transformers", "falcon_bridge, graph")


def default_cases(sides) -> list[str]:
    """Most important first: a deadline may cut off the rest."""
    return [
        "longest:500M",
        # one process for all of its lengths: mamba-ssm's kernels, timed for a minute and more, are the same for all
        *(f"throughput:0.5B:{side}:4096,16384,32768" for side in sides if side == "transformers"),
        *(f"throughput:0.5B:{s}:{length}" for length in (32768, 4096, 16384) for s in sides if s != "transformers"),
        *(f"curve:500M:{pattern}:{length}" for length in (131072, 16384, 65536) for pattern in ("SSM", "hybrid")),
        *(f"curve:500M:{pattern}:{length}" for length in (32768, 8192) for pattern in ("SSM", "hybrid")),
    ]


def run_case(case: str, figures: dict) -> None:
    kind, size, *rest = case.split(":")
    if kind == "throughput":
        side, lengths = rest
        throughput(size, side, [int(length) for length in lengths.split(",")], figures)
        return
    with one_rank():
        if kind == "longest":
            longest(size, rest[0] if rest else "mixer, mlp", figures)
        else:
            pattern, length = rest
            curve(size, pattern, int(length), figures)


def longest(size: str, recompute: str, figures: dict) -> None:
    """One step at the longest length, a multiple of `MULTIPLE`, that the estimate allows this GPU."""
    from falcon_bridge.training.limits import largest_scan_tensor, scan_reach
    from falcon_bridge.training.memory import usable_memory

    limit = usable_memory()

    def fits(length: int) -> bool:
        cfg = build(size, length, 1, RECOMPUTE[recompute])
        return estimate(cfg)["peak"] <= limit and largest_scan_tensor(cfg.model, length) < scan_reach(cfg.model)

    low, high = 1, 2
    while fits(high * MULTIPLE):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * MULTIPLE) else (low, middle)
    figures |= {"recompute": recompute, "limit": limit}
    step_of(size, low * MULTIPLE, RECOMPUTE[recompute], 1, figures)


def curve(size: str, pattern: str, length: int, figures: dict) -> None:
    """A step of a model of one kind of layer, as many as the size has."""
    layers = build(size, WARM_UP, 1, {}).model.num_layers
    # layers without an MLP have none to recompute
    recompute = RECOMPUTE["mixer, mlp"] if pattern == "hybrid" else {"recompute_mixer": True}
    fields = {**recompute, "layer_pattern": PATTERNS[pattern] * layers}
    step_of(size, length, fields, 2 if length <= 65536 else 1, figures)


def step_of(size: str, length: int, fields: dict, steps: int, figures: dict) -> None:
    """Peak and seconds of a step at `length`, behind a short one that compiles kernels and fills the optimizer."""
    cfg = build(size, length, 1, fields)
    figures |= {"length": length, "device": torch.cuda.get_device_name(), "estimate": estimate(cfg)}
    step = Step(cfg)
    step.forward_backward(min(WARM_UP, length))
    step.optimizer.step()
    figures["state"] = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        figures["loss"] = step.forward_backward()
        step.optimizer.step()
        torch.cuda.synchronize()
        figures["seconds"] = time.perf_counter() - started
    figures["peak"] = torch.cuda.max_memory_allocated()
    figures["peak_reserved"] = torch.cuda.max_memory_reserved()
    figures["tokens_per_s"] = length / figures["seconds"]


def throughput(size: str, side: str, lengths: list[int], figures: dict) -> None:
    """Whole steps of `training_step` on `TOKENS` tokens in rows of each length; several for transformers only."""
    from benchmarks.training_step import measure

    figures |= {"side": side, "device": torch.cuda.get_device_name(), "points": []}
    for length in lengths:
        result = measure(side, size, length, TOKENS // length, False)
        point = {"length": length, "seconds": result["step_ms"] / 1e3, "tokens_per_s": result["tokens_per_s"]}
        figures["points"].append({**point, "peak": int(result["peak_GiB"] * GIB), "loss": result["loss"]})
        gc.collect()
        torch.cuda.empty_cache()


def one_by_one(figures: dict) -> list[dict]:
    """The points of a case, each with a case of its own."""
    shared = dict(figures)
    points, names = shared.pop("points", []), names_of(shared["case"])
    found = [{**shared, **point, "case": name} for point, name in zip(points, names, strict=False)]
    return found if points and "error" not in shared else [*found, shared]


def names_of(case: str) -> list[str]:
    """The cases that a case with several lengths stands for."""
    name, _, lengths = case.rpartition(":")
    return [f"{name}:{length}" for length in lengths.split(",")]


def describe(figures: dict) -> str:
    """One line of a point."""
    if "error" in figures:
        return f"{figures['case']}: {figures['error']}"
    line = f"{figures['case']}: {figures['length']:,} tokens a row, {figures['seconds']:.2f} s, "
    line += f"{figures['tokens_per_s']:,.0f} tokens/s, peak {figures['peak'] / GIB:.2f} GiB"
    if "estimate" in figures:
        estimated = figures["estimate"]["peak"]
        line += f", estimated {estimated / GIB:.2f} ({estimated / figures['peak']:.3f} of it)"
    return line


def draw(results: list[dict], directory: Path) -> None:
    """`long_context_memory.png` and `long_context_throughput.png`, each where it has two points or more."""
    points: dict[str, list[dict]] = {}
    for figures in results:
        kind, size, *rest = figures["case"].split(":")
        if kind == "longest" and not rest:  # one more point of the hybrid's curve
            kind, figures = "curve", {**figures, "case": f"curve:{size}:hybrid:{figures.get('length')}"}
        if "error" not in figures:
            points.setdefault(kind, []).append(figures)
    directory.mkdir(parents=True, exist_ok=True)
    if len(points.get("curve", [])) > 1:
        draw_curves(points["curve"], directory / "long_context_memory.png")
    if len(points.get("throughput", [])) > 1:
        draw_throughput(points["throughput"], directory / "long_context_throughput.png")


def draw_curves(points: list[dict], path: Path) -> None:
    from falcon_bridge.training.plot import new_figure

    figure = new_figure(4)
    memory = figure.subplots()
    for pattern, found in by(points, lambda point: point["case"].split(":")[2]).items():
        lengths = [point["length"] / 1024 for point in found]
        (line,) = memory.plot(lengths, [point["peak"] / GIB for point in found], "o-", label=f"{pattern}, measured")
        estimated = [point["estimate"]["peak"] / GIB for point in found]
        memory.plot(lengths, estimated, "--", color=line.get_color(), alpha=0.6, label=f"{pattern}, estimated")
    memory.set_ylabel("peak memory (GiB)")
    memory.set_ylim(bottom=0)
    memory.set_xlim(left=0)
    size = points[0]["case"].split(":")[1]
    memory.set_title(f"Layers of Falcon-H1-{size}, one row a step, recomputed ({points[0]['device']})")
    finish(figure, path, memory)


def draw_throughput(points: list[dict], path: Path) -> None:
    from falcon_bridge.training.plot import new_figure

    figure = new_figure(4)
    axes = figure.subplots()
    for side, found in by(points, lambda point: point["side"]).items():
        axes.plot([p["length"] / 1024 for p in found], [p["tokens_per_s"] / 1e3 for p in found], "o-", label=side)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("thousand tokens/s")
    axes.set_title(f"{points[0]['case'].split(':')[1]}, {TOKENS:,} tokens a step ({points[0]['device']})")
    finish(figure, path, axes)


def by(points: list[dict], key) -> dict[str, list[dict]]:
    """Points by key, each list in the order of length."""
    groups: dict[str, list[dict]] = {}
    for point in sorted(points, key=lambda point: point["length"]):
        groups.setdefault(key(point), []).append(point)
    return groups


def finish(figure, path: Path, *panels) -> None:
    for axes in panels:
        axes.set_xlabel("length of a row (1,024 tokens)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="longest:SIZE[:RECOMPUTE], curve:SIZE:PATTERN:LENGTH or "
                        "throughput:SIZE:SIDE:LENGTH[,LENGTH...]; repeatable; none for no case")  # fmt: skip
    parser.add_argument("--side", action="append", help="of the throughput, as training_step names them; repeatable")
    parser.add_argument("--json", type=Path, help="results, written after each point; those of other cases stay")
    parser.add_argument("--plot", type=Path, help="directory of the pictures")
    parser.add_argument("--deadline", type=float, default=600, help="seconds for all of it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        from falcon_bridge import FalconH1ModelProvider  # noqa: F401  while another point computes

        answer(arguments.one, run_case, torch.OutOfMemoryError)
        return
    deadline = time.monotonic() + arguments.deadline
    # tensors of many sizes, close to all that there is
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cases = [case for case in arguments.case or default_cases(arguments.side or SIDES) if case != "none"]
    results = []
    if arguments.json and arguments.json.exists():
        again = {name for case in cases for name in names_of(case)}
        results = [figures for figures in json.loads(arguments.json.read_text()) if figures["case"] not in again]
    for case in run_each("benchmarks.long_context", cases, deadline=deadline, ahead=3):
        for figures in one_by_one(case):
            results.append(figures)
            print(describe(figures), flush=True)
        write_json(arguments.json, results)
    if arguments.plot:
        draw(results, arguments.plot)


if __name__ == "__main__":
    main()
