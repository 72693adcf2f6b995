"""Which precision A_log, D and dt_bias need: a small Falcon-H1 trained on text in four settings.

- fp32: everything, the truth.
- bf16, fp32 SSM vectors: the model in bf16, A_log, D and dt_bias in fp32; the optimizer steps fp32 main weights.
- bf16, bf16 SSM vectors: A_log, D and dt_bias are rounded to bf16 for the model, too; their main weights are fp32.
- bf16 without main weights: AdamW steps the bf16 parameters, so an update below half an ulp is lost.

All start from the same weights and see the same bytes of the Python language reference.

    python benchmarks/precision.py --out DIR
"""

import argparse
import json
import logging
import os
import tempfile
import time
from pathlib import Path


# one configuration a kernel: nothing here is about their speed
os.environ.update(MAMBA_DETERMINISTIC="1", TRITON_CACHE_AUTOTUNING="0")

import torch
import torch.distributed as dist

from falcon_bridge.verification.verify import use_full_precision


VECTORS = ("A_log", "D", "dt_bias")
SETTINGS = {
    "fp32": (torch.float32, True, True),
    "bf16, fp32 SSM vectors": (torch.bfloat16, True, True),
    "bf16, bf16 SSM vectors": (torch.bfloat16, False, True),
    "bf16 without main weights": (torch.bfloat16, False, False),
}
LAST = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, help="directory for precision.json and precision.md")
    parser.add_argument("--steps", type=int, default=300 if on_gpu else 40)
    parser.add_argument("--layers", type=int, default=4 if on_gpu else 2)
    parser.add_argument("--hidden", type=int, default=512 if on_gpu else 64)
    parser.add_argument("--batch", type=int, default=8 if on_gpu else 4)
    parser.add_argument("--seq", type=int, default=512 if on_gpu else 96)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def text_bytes() -> torch.Tensor:
    from falcon_bridge.demo.text import python_reference

    return torch.frombuffer(bytearray("\0".join(python_reference().train).encode()), dtype=torch.uint8).long()


def build(args: argparse.Namespace, dtype: torch.dtype, fp32_vectors: bool):
    """The model in Megatron's data-parallel wrapper, as training builds it."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from falcon_bridge import FalconH1ModelProvider
    from falcon_bridge.models.falcon_h1.ssm import FalconH1MambaMixer

    heads = args.hidden // 32
    provider = FalconH1ModelProvider(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=max(2, args.hidden // 64),
        num_query_groups=2,
        kv_channels=min(64, args.hidden // 2),
        ffn_hidden_size=2 * args.hidden,
        mamba_num_heads=heads,
        mamba_head_dim=64,
        mamba_state_dim=64,
        vocab_size=256,
        seq_length=args.seq,
        rotary_base=1e5,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    provider.finalize()
    if not fp32_vectors:

        def round_them_too(chunks):
            for module in chunks[0].modules():
                if isinstance(module, FalconH1MambaMixer):
                    module._keep_in_float32_parameter_names = ()
            return chunks

        provider.register_pre_wrap_hook(round_them_too)
    provider.initialize_model_parallel(seed=1)
    (model,) = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), data_parallel_random_init=False
    )
    return model


def vectors(model, *, main: bool) -> dict[str, torch.Tensor]:
    """Each kind of SSM vector over all layers, fp64: what the model computes with, or what the optimizer steps."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in VECTORS}
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in found:
            source = getattr(parameter, "main_param", None) if main else None
            found[leaf].append((parameter if source is None else source).detach().double().flatten())
    return {name: torch.cat(parts).clone() for name, parts in found.items()}


def make_step(model, args: argparse.Namespace, main_weights: bool):
    """A function that steps the optimizer at a learning rate, and zeroes what it used."""
    betas, eps, decay, clip = (0.9, 0.95), 1e-8, 0.1, 1.0
    if main_weights:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config = model.module.config
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=args.lr,
                weight_decay=decay,
                adam_beta1=betas[0],
                adam_beta2=betas[1],
                adam_eps=eps,
                clip_grad=clip,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
            ),
            [model],
        )

        def step(lr: float) -> None:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

        return step
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=eps)

    def step_the_parameters(lr: float) -> None:
        for parameter in parameters:
            parameter.grad = parameter.main_grad.to(parameter.dtype)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        for parameter in parameters:
            parameter.grad = None

    return step_the_parameters


def train(args: argparse.Namespace, name: str, text: torch.Tensor, start: list[torch.Tensor] | None):
    """Train one setting.

    Returns:
        Losses, the SSM vectors before and after (as the model and as the optimizer have them), the initial weights.
    """
    from megatron.core import parallel_state

    dtype, fp32_vectors, main_weights = SETTINGS[name]
    model = build(args, dtype, fp32_vectors)
    with torch.no_grad():
        if start is None:
            start = [p.detach().cpu().clone() for p in model.parameters()]
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
    step = make_step(model, args, main_weights)
    before = vectors(model, main=False)
    draw = torch.Generator().manual_seed(2)
    device = next(model.parameters()).device
    positions = torch.arange(args.seq, device=device)[None].expand(args.batch, -1)
    losses = []
    for number in range(args.steps):
        starts = torch.randint(0, len(text) - args.seq - 1, (args.batch,), generator=draw)
        rows = torch.stack([text[i : i + args.seq + 1] for i in starts.tolist()]).to(device)
        model.zero_grad_buffer()
        loss = model(rows[:, :-1].contiguous(), positions, None, labels=rows[:, 1:].contiguous()).float().mean()
        loss.backward()
        model.finish_grad_sync()
        step(args.lr * min(1.0, (number + 1) / 20))
        losses.append(loss.detach())
    result = torch.stack(losses).tolist(), before, vectors(model, main=False), vectors(model, main=True)
    parallel_state.destroy_model_parallel()
    return result, start


def figures(result, truth) -> dict:
    (losses, before, after, main), (true_losses, _, true_after, _) = result, truth
    last = sum(losses[-LAST:]) / len(losses[-LAST:])
    row: dict = {"loss": last, "loss_above_fp32": last - sum(true_losses[-LAST:]) / len(true_losses[-LAST:])}
    for name in VECTORS:
        path = (true_after[name] - truth[1][name]).norm()
        row[name] = {
            "moved": ((main[name] - before[name]).norm() / path).item(),
            "unmoved_share": (after[name] == before[name]).double().mean().item(),
            "off_fp32": ((main[name] - true_after[name]).norm() / path).item(),
            "rounded_away": ((after[name] - main[name]).norm() / path).item(),
        }
    return row


def table(rows: dict[str, dict]) -> str:
    lines = [
        f"| setting | loss, last {LAST} steps | above fp32 | | moved | off fp32 | rounded away | unmoved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for vector in VECTORS:
            v, first = row[vector], vector == VECTORS[0]
            loss = f"{row['loss']:.4f} | {row['loss_above_fp32']:+.4f}" if first else " | "
            lines.append(
                f"| {name if first else ''} | {loss} | {vector} | {v['moved']:.3f} | {v['off_fp32']:.3f} "
                f"| {v['rounded_away']:.3f} | {v['unmoved_share']:.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    logging.disable(logging.WARNING)
    use_full_precision(os.environ.__setitem__)
    from falcon_bridge.compat import cpu_runtime

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    on_gpu, text, start, results, seconds = torch.cuda.is_available(), text_bytes(), None, {}, {}
    with tempfile.TemporaryDirectory() as directory, cpu_runtime():
        store = f"file://{directory}/store"
        dist.init_process_group("nccl" if on_gpu else "gloo", init_method=store, rank=0, world_size=1)
        for name in SETTINGS:
            began = time.perf_counter()
            results[name], start = train(args, name, text, start)
            seconds[name] = time.perf_counter() - began
            print(f"{name}: {seconds[name]:.0f} s", flush=True)
        dist.destroy_process_group()
    rows = {name: figures(result, results["fp32"]) for name, result in results.items()}
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{device}; {vars(args)}\n{table(rows)}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "precision.md").write_text(table(rows) + "\n")
        about = {"device": device, "arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": seconds}
        losses = {name: result[0] for name, result in results.items()}
        (args.out / "precision.json").write_text(json.dumps({**about, "rows": rows, "losses": losses}, indent=1))


if __name__ == "__main__":
    main()
