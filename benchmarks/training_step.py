"""Whole training steps on one GPU: transformers, Megatron Bridge's own falcon_h1, and falcon_bridge, in one run.

A step is forward, backward and a fused AdamW over all parameters, bf16, random tokens, each side in a fresh process.
Shapes and multipliers are the same for all sides. In "falcon_bridge, graph" Megatron captures forward and backward,
as under `model.cuda_graph_impl=full_iteration`. mamba-ssm's kernels have our shipped configurations on the side of
transformers, too, instead of a minute of tuning; FALCON_BRIDGE_TUNING=autotune has them timed. `--profile` adds how
long the GPU is busy, and with what.

    TRITON_CACHE_AUTOTUNING=1 python benchmarks/training_step.py --json steps.json
    python benchmarks/training_step.py --size 0.5B --side falcon_bridge --profile
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


MULTIPLIERS = {
    "embedding_multiplier": 5.6,
    "lm_head_multiplier": 0.04,
    "key_multiplier": 0.4,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.24,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 0.94,
    "mlp_multipliers": (0.88, 0.6),
    "ssm_multipliers": (0.35, 0.25, 0.18, 0.5, 0.35),
}
SHAPES = {
    "0.5B": {
        "hidden_size": 1024,
        "num_layers": 36,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 64,
        "ffn_hidden_size": 2048,
        "vocab_size": 32784,
        "mamba_num_heads": 24,
        "mamba_head_dim": 64,
        "mamba_state_dim": 128,
        "chunk_size": 128,
    },
    "1.5B": {
        "hidden_size": 2048,
        "num_layers": 24,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 128,
        "ffn_hidden_size": 4096,
        "vocab_size": 65536,
        "mamba_num_heads": 48,
        "mamba_head_dim": 64,
        "mamba_state_dim": 256,
        "chunk_size": 256,
    },
}
BATCH = {"0.5B": 4, "1.5B": 2}
GRAPH = ", graph"
SIDES = {
    "transformers": {},
    "bridge": MULTIPLIERS,
    "falcon_bridge": MULTIPLIERS,
    "falcon_bridge, mamba_ssm": {**MULTIPLIERS, "ssm_backend": "mamba_ssm"},
    f"falcon_bridge{GRAPH}": MULTIPLIERS,
    f"falcon_bridge{GRAPH}, mamba_ssm": {**MULTIPLIERS, "ssm_backend": "mamba_ssm"},
    f"falcon_bridge{GRAPH}, recompute_gates": {**MULTIPLIERS, "recompute_gates": True},
    f"falcon_bridge{GRAPH}, multipliers 1": {},
}
HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "mamba_num_heads": "mamba_n_heads",
    "mamba_head_dim": "mamba_d_head",
    "mamba_state_dim": "mamba_d_state",
    "chunk_size": "mamba_chunk_size",
}
CATEGORIES = {
    "attention": r"cudnn|flash|fmha|sdpa",
    "GEMM": r"gemm|nvjet|cutlass|xmma|cublas",
    "SSD": r"_chunk_|state_passing|step_decay|_(step|input|group)_gradients",
    "conv": r"conv1d",
    "norm": r"norm",
    "optimizer": r"multi_tensor|adam",
    "copy, cast": r"copy|Memcpy|Memset|fill",
}


def transformers_step(shape: dict, tokens):
    import torch
    from transformers import FalconH1Config, FalconH1ForCausalLM

    from falcon_bridge.ops.tuning.shipped import use_shipped_tuning

    use_shipped_tuning()
    config = FalconH1Config(
        **{HF_NAMES.get(name, name): value for name, value in shape.items()},
        **{name: list(value) if isinstance(value, tuple) else value for name, value in MULTIPLIERS.items()},
        mamba_d_ssm=shape["mamba_num_heads"] * shape["mamba_head_dim"],
        mamba_n_groups=1,
        mamba_rms_norm=False,
        mamba_norm_before_gate=False,
        tie_word_embeddings=False,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = FalconH1ForCausalLM(config).to(torch.bfloat16)
    return model.train(), lambda tokens=tokens: model(input_ids=tokens, labels=tokens).loss


def megatron_step(shape: dict, tokens, provider_class, **fields):
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    provider = provider_class(
        **shape,
        **fields,
        mamba_num_groups=1,
        seq_length=tokens.shape[1],
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
    )
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = provider.provide(pre_process=True, post_process=True).cuda()
    positions = torch.arange(tokens.shape[1], device="cuda")[None].expand(*tokens.shape).contiguous()
    return model.train(), lambda tokens=tokens: model(tokens, positions, None, labels=tokens).float().mean()


def build(side: str, size: str, tokens):
    """The model of a side, and what computes its loss."""
    shape = SHAPES[size]
    if side == "transformers":
        return transformers_step(shape, tokens)
    start_one_rank(graph_safe=GRAPH in side)
    if side == "bridge":
        import torch
        from megatron.bridge.models.falcon_h1.falconh1_provider import FalconH1ModelProvider
        from megatron.core.transformer.enums import AttnBackend

        extra = {"rmsnorm": False, "attention_backend": AttnBackend.auto, "activation_func": torch.nn.functional.silu}
        return megatron_step(shape, tokens, FalconH1ModelProvider, **SIDES[side], **extra)
    from falcon_bridge import FalconH1ModelProvider

    return megatron_step(shape, tokens, FalconH1ModelProvider, gated_norm=False, **SIDES[side])


def start_one_rank(graph_safe: bool = False) -> None:
    import torch
    from megatron.core import parallel_state, tensor_parallel

    store = tempfile.mkdtemp()
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=graph_safe)


def captured(model, loss_of, tokens):
    """Forward and backward as Megatron's loop runs them, from the third call on in its CUDA graph."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper
    from megatron.core.pipeline_parallel import get_forward_backward_func

    graph = FullCudaGraphWrapper(get_forward_backward_func(), cuda_graph_warmup_steps=2)
    batches, (rows, length) = itertools.repeat({"tokens": tokens}), tokens.shape
    sizes = {"num_microbatches": 1, "seq_length": length, "micro_batch_size": rows, "forward_only": False}

    def forward_step(batches, model):
        return loss_of(next(batches)["tokens"]), lambda loss: (loss, {"loss": loss.detach().clone()})

    def forward_backward():
        if graph.cuda_graph["training"] is None:  # replays write the gradients where the capture put them
            model.zero_grad(set_to_none=True)
        return graph(forward_step_func=forward_step, data_iterator=batches, model=model, **sizes)[0]["loss"]

    return forward_backward


def measure(side: str, size: str, seq_length: int, batch: int, profile: bool) -> dict:
    import torch

    torch.manual_seed(0)
    torch.cuda.set_device(0)
    tokens = torch.randint(0, SHAPES[size]["vocab_size"], (batch, seq_length), device="cuda")
    started = time.perf_counter()
    model, loss_of = build(side, size, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def ordinary():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        return loss

    forward_backward = captured(model, loss_of, tokens) if GRAPH in side else ordinary

    def step():
        loss = forward_backward()
        optimizer.step()
        return loss

    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):  # of which a graph's capture is one: replays allocate nothing
        step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(8):
        loss = step()
    end.record()
    torch.cuda.synchronize()
    milliseconds = start.elapsed_time(end) / 8
    # how long the host takes to issue a step: where this is no less than the step, the GPU waits for launches
    issued = time.perf_counter()
    step()
    issued = time.perf_counter() - issued
    torch.cuda.synchronize()
    result = {"side": side, "size": size, "seq_length": seq_length, "batch": batch}
    result |= {
        "step_ms": milliseconds,
        "tokens_per_s": batch * seq_length / milliseconds * 1e3,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "first_step_s": first,
        "host_ms": issued * 1e3,
        "loss": loss.item(),
    }
    if profile:
        result["kernels"] = kernels_of(step)
    return result


def kernels_of(step) -> dict:
    """Milliseconds and launches of one step in all and by category, and its 60 costliest kernels."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.self_device_time_total]
    categories: dict[str, list] = {}
    for event in events:
        kind = next(
            (k for k, pattern in CATEGORIES.items() if re.search(pattern, event.key, re.I)), "elementwise, rest"
        )
        total = categories.setdefault(kind, [0.0, 0])
        total[0] += event.self_device_time_total / 1e3
        total[1] += event.count
    top = sorted(events, key=lambda e: -e.self_device_time_total)[:60]
    return {
        "busy_ms": sum(event.self_device_time_total for event in events) / 1e3,
        "by_category_ms_launches": categories,
        "top": [[round(e.self_device_time_total / 1e3, 3), e.count, e.key[:150]] for e in top],
    }


def in_fresh_process(arguments: argparse.Namespace, side: str, size: str) -> dict:
    command = [sys.executable, __file__, "--one", side, size, str(arguments.seq_length)]
    command += [str(arguments.batch or BATCH[size])] + (["--profile"] if arguments.profile else [])
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NVTE_DEBUG": "0"})
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not lines:
        return {"side": side, "size": size, "error": (run.stderr or run.stdout)[-1500:]}
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=list(SHAPES))
    parser.add_argument("--side", action="append", choices=list(SIDES))
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, size, seq_length, batch = arguments.one
        print("RESULT", json.dumps(measure(side, size, int(seq_length), int(batch), arguments.profile)))
        return
    results = []
    for size in arguments.size or SHAPES:
        baseline = None
        for side in arguments.side or ("transformers", "bridge", "falcon_bridge", f"falcon_bridge{GRAPH}"):
            result = in_fresh_process(arguments, side, size)
            results.append(result)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
            if "error" in result:
                print(f"{size} {side}: FAILED\n{result['error']}", flush=True)
                continue
            baseline = baseline or result["tokens_per_s"]
            busy = f", GPU busy {result['kernels']['busy_ms']:.0f} ms" if arguments.profile else ""
            line = f"{size} {side}: {result['step_ms']:.1f} ms{busy}, {result['tokens_per_s']:,.0f} tokens/s "
            line += f"({result['tokens_per_s'] / baseline:.2f}×), peak {result['peak_GiB']:.1f} GiB, issued in "
            line += f"{result['host_ms']:.0f} ms, first step after {result['first_step_s']:.0f} s, "
            print(f"{line}loss {result['loss']:.3f}", flush=True)


if __name__ == "__main__":
    main()
