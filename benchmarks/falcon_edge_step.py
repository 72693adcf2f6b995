"""Training steps of Falcon-Edge 1B on one GPU: ternary, the same model dense in bf16, and with onebitllms' kernels.

A step is forward, backward and a fused AdamW over all parameters, bf16, random tokens. It has one micro-batch, so that
weights are quantised in every pass. Each side is a fresh process and is timed twice: eagerly, where the host issues
every kernel, and with forward and backward in one CUDA graph. `--profile` adds what a replayed step's kernels cost.

    python -m benchmarks.falcon_edge_step --json edge.json
    python -m benchmarks.falcon_edge_step --side fused --side dense --batch 2 --profile
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.processes import answer, run_each, write_json
from benchmarks.training_step import kernels_of


SIDES = {
    "dense": {"use_bitnet": False},
    "fused": {"use_bitnet": True, "bitnet_backend": "fused"},
    "onebitllms": {"use_bitnet": True, "bitnet_backend": "onebitllms"},
}
WARMUP, STEPS = 3, 8


def build(size: str, seq_length: int, fields: dict):
    """The model of a side, as a run with captured iterations configures it."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from falcon_bridge.models.falcon_edge import sizes

    store = tempfile.mkdtemp()
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    # states of random numbers that a graph can hold
    tensor_parallel.model_parallel_cuda_manual_seed(1, te_rng_tracker=True)
    provider = getattr(sizes, f"FalconEdgeModelProvider{size}")(
        seq_length=seq_length,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        cuda_graph_impl="full_iteration",
        **fields,
    )
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return provider.provide(pre_process=True, post_process=True).cuda().train()


def measure(case: str, figures: dict) -> None:
    """Fill in the figures of one side."""
    import torch
    from megatron.core.tensor_parallel.random import get_all_rng_states

    side, size, seq_length, batch, profile = json.loads(case)
    torch.manual_seed(0)
    torch.cuda.set_device(0)
    model = build(size, seq_length, SIDES[side])
    tokens = torch.randint(0, model.config.vocab_size, (batch, seq_length), device="cuda")
    positions = torch.arange(seq_length, device="cuda")[None].expand(batch, -1).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def forward_backward():
        loss = model(tokens, positions, None, labels=tokens).float().mean()
        loss.backward()
        return loss.detach()

    def eager_step():
        loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    figures.update(side=side, size=size, seq_length=seq_length, batch=batch)
    # the capture's stream is another one, and so are the first steps: gradients stay with the stream that made them
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        figures["eager"] = timed(eager_step, batch * seq_length)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        for state in get_all_rng_states().values():
            graph.register_generator_state(state)
        torch.cuda.reset_peak_memory_stats()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                captured_loss = forward_backward()
        except RuntimeError as error:
            figures["error"] = f"not captured: {str(error).splitlines()[0]}"
            return

        def graphed_step():
            graph.replay()
            optimizer.step()  # its hooks have the weights quantised anew in eager passes; the graph always does
            return captured_loss

        # the peak is the capture's: a replay allocates nothing
        figures["captured"] = timed(graphed_step, batch * seq_length, reset=False)
        if profile:
            figures["kernels"] = kernels_of(graphed_step)


def timed(step: Callable, tokens: int, reset: bool = True) -> dict:
    """Milliseconds, tokens per second and peak memory of a step, and how long the host takes to issue it."""
    import torch

    for _ in range(WARMUP):
        step()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(STEPS):
        loss = step()
    end.record()
    torch.cuda.synchronize()
    milliseconds = start.elapsed_time(end) / STEPS
    issued = time.perf_counter()
    step()
    issued = time.perf_counter() - issued
    torch.cuda.synchronize()
    return {
        "step_ms": milliseconds,
        "tokens_per_s": tokens / milliseconds * 1e3,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "host_ms": issued * 1e3,
        "loss": loss.item(),
    }


def show(figures: dict, dense: dict | None) -> None:
    """Print a side; ratios are to the dense twin."""
    if "error" in figures:
        print(f"{figures.get('side') or figures['case']}: {figures['error']}", flush=True)
    for way in ("eager", "captured"):
        if way not in figures:
            continue
        one, base = figures[way], (dense or {}).get(way)
        ratios = ""
        if base:
            time_ratio, memory_ratio = one["step_ms"] / base["step_ms"], one["peak_GiB"] / base["peak_GiB"]
            ratios = f" ({time_ratio:.3f}× the time, {memory_ratio:.3f}× the memory of dense)"
        print(
            f"{figures['side']}, {way}: {one['step_ms']:.1f} ms, {one['tokens_per_s']:,.0f} tokens/s, "
            f"peak {one['peak_GiB']:.2f} GiB{ratios}, issued in {one['host_ms']:.0f} ms, loss {one['loss']:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", action="append", choices=list(SIDES), help="may be repeated; default: all")
    parser.add_argument("--size", choices=("1B", "3B"), default="1B")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here, after each side")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that a side may take once it has started")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        from torch import OutOfMemoryError

        import falcon_bridge.models.falcon_edge.sizes  # noqa: F401 - while another side computes

        answer(arguments.one, measure, OutOfMemoryError)
        return
    common = arguments.size, arguments.seq_length, arguments.batch, arguments.profile
    cases = [json.dumps([side, *common]) for side in arguments.side or SIDES]
    results, dense = [], None
    for figures in run_each("benchmarks.falcon_edge_step", cases, timeout=arguments.timeout):
        results.append(figures)
        write_json(arguments.json, results)
        show(figures, dense)
        if figures.get("side") == "dense":
            dense = figures


if __name__ == "__main__":
    main()
