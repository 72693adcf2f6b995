"""BitNet linears on one GPU: bf16, onebitllms and falcon_bridge's `fused` backend in one run.

Each side is a layer with bf16 weights, fed bf16 tokens: `torch.nn.Linear`, onebitllms' `BitNetLinear`, and our
`BitNetColumnParallelLinear`. Ours quantises its weight once an optimizer step, so it is timed twice: with the codes
cached, as in every micro-batch but the first, and quantising each time, as with a single micro-batch a step. Before
anything is timed, ours is compared with the oracle: outputs bit for bit, gradients within bf16's rounding.

Eager times include the host's, which rules over small layers. The last columns are forward and backward replayed from
a CUDA graph: the device's time alone.

    python benchmarks/bitnet_linear.py
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import triton
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from falcon_bridge.bitnet import BitNetColumnParallelLinear
from falcon_bridge.bitnet.backends import choose_backend
from falcon_bridge.bitnet.codes import invalidate
from falcon_bridge.bitnet.function import ternary_linear
from falcon_bridge.bitnet.reference import bitlinear


SHAPES = {
    "8192 × 2048 → 8192": (8192, 2048, 8192),
    "8192 × 8192 → 2048": (8192, 8192, 2048),
    "8192 × 4096 → 4096": (8192, 4096, 4096),
    "16384 × 4096 → 14336": (16384, 4096, 14336),
    "Falcon-Edge qkv": (8192, 2048, 2560),
    "Falcon-Edge proj": (8192, 2048, 2048),
    "Falcon-Edge-1B fc1": (8192, 2048, 2 * 9216),
    "Falcon-Edge-1B fc2": (8192, 9216, 2048),
    "Falcon-Edge-3B fc1": (8192, 2048, 2 * 13312),
    "Falcon-Edge-3B fc2": (8192, 13312, 2048),
}
"""Tokens, input and output features: those of the plain bf16 baseline, then layers of Falcon-Edge."""


def milliseconds(call) -> float:
    return triton.testing.do_bench(call, warmup=30, rep=150, return_mode="median")


class Timed:
    """Forward and backward of a layer on `x`, once or between CUDA events."""

    def __init__(self, layer, x: torch.Tensor, grad: torch.Tensor, before=lambda: None) -> None:
        self.layer, self.x, self.grad, self.before = layer, x, grad, before

    def forward(self) -> None:
        self.before()
        with torch.no_grad():
            self.layer(self.x)

    def both(self) -> None:
        self.before()
        self.layer(self.x).backward(self.grad)
        self.x.grad = self.layer.weight.grad = None

    def figures(self, captured=None) -> dict[str, float | None]:
        """Times; in a graph those of `captured`, which by default is the layer."""
        return {
            "forward_ms": milliseconds(self.forward),
            "both_ms": milliseconds(self.both),
            "graph_ms": self.graph_ms(captured or self.layer),
            "saved_bytes": self.saved_bytes(),
        }

    def graph_ms(self, layer) -> float | None:
        """Forward and backward in a CUDA graph; None where something in them waits for the device."""

        def both() -> tuple[torch.Tensor, ...]:
            self.before()
            y = layer(self.x)
            return torch.autograd.grad(y, (self.x, self.layer.weight), self.grad)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            both()
            # a capture that fails would take the process with it
            torch.cuda.set_sync_debug_mode("error")
            try:
                both()
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                return None
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            gradients = both()
        time = milliseconds(graph.replay)
        del gradients
        invalidate()  # the codes are the graph's
        return time

    def saved_bytes(self) -> int:
        """Bytes that the layer keeps for the backward pass beside its parameters and what belongs to all calls."""
        shared = {p.untyped_storage().data_ptr() for p in self.layer.parameters()}
        if hasattr(self.layer, "codes"):
            shared |= {tensor.untyped_storage().data_ptr() for tensor in self.layer.codes()}
        saved = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in shared:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.layer(self.x)
        return sum(saved.values())


class Ours(torch.nn.Module):
    """`BitNetColumnParallelLinear` with the call of `torch.nn.Linear`."""

    def __init__(self, config: TransformerConfig, k: int, n: int) -> None:
        super().__init__()
        self.linear = BitNetColumnParallelLinear(
            k, n, config=config, init_method=torch.nn.init.normal_, bias=False, gather_output=False
        )
        self.weight = self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[0]

    def codes(self) -> tuple[torch.Tensor, ...]:
        return self.linear.weight_codes()

    def with_codes_of_now(self):
        """The layer as a micro-batch finds it whose codes are there: a capture would make its own."""
        codes, backend = self.linear.weight_codes(), choose_backend("auto", "cuda")
        return lambda x: ternary_linear(x, self.weight, codes, backend)


def check(ours: Ours, x: torch.Tensor, grad: torch.Tensor) -> None:
    """Compare with the oracle on the first tokens."""
    x, grad = x[:256].detach(), grad[:256]
    results = []
    for layer in (ours, lambda value: bitlinear(value, ours.weight)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, ours.weight), grad)))
    (y, *grads), (y_reference, *grads_reference) = results
    assert torch.equal(y, y_reference), "the output differs from the oracle's"
    for actual, expected in zip(grads, grads_reference, strict=True):
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        assert error < 2**-7, f"a gradient is off by {error:.1e}"


def run(name: str, config: TransformerConfig) -> dict:
    m, k, n = SHAPES[name]
    torch.manual_seed(0)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    dense = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    ours = Ours(config, k, n)
    with torch.no_grad():
        ours.weight.copy_(dense.weight)
    invalidate()
    check(ours, x, grad)
    figures = {"bf16": Timed(dense, x, grad).figures()}
    if onebitllms := onebitllms_layer(dense):
        # its kernels take [b, s, h] only
        figures["onebitllms"] = Timed(onebitllms, x.detach()[None].requires_grad_(), grad[None]).figures()
    figures["fused, codes cached"] = Timed(ours, x, grad).figures(ours.with_codes_of_now())
    figures["fused, quantising"] = Timed(ours, x, grad, before=invalidate).figures()
    return {"shape": name, "tokens": m, "in": k, "out": n, **figures}


def onebitllms_layer(dense: torch.nn.Linear):
    try:
        from onebitllms import BitNetLinear
    except ImportError:
        return None
    layer = BitNetLinear(dense.in_features, dense.out_features).to("cuda", torch.bfloat16)
    layer.weight.data.copy_(dense.weight)
    return layer


def row(result: dict) -> str:
    base = result["bf16"]
    cells = [result["shape"], f"{base['forward_ms']:.3f} / {base['both_ms']:.3f}"]
    for side in ("onebitllms", "fused, codes cached", "fused, quantising"):
        figures = result.get(side)
        ratio = figures and figures["both_ms"] / base["both_ms"]
        cells.append("–" if not figures else f"{figures['forward_ms']:.3f} / {figures['both_ms']:.3f} ({ratio:.2f}×)")
    cells.append(f"{result['fused, codes cached']['saved_bytes'] / base['saved_bytes']:.3f}×")
    for side in ("bf16", "onebitllms", "fused, codes cached", "fused, quantising"):
        time = result.get(side, {}).get("graph_ms")
        ratio = "" if side == "bf16" or not time else f" ({time / base['graph_ms']:.2f}×)"
        cells.append(f"{time:.3f}{ratio}" if time else "–")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="may be repeated; default: all")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=1, hidden_size=128, num_attention_heads=1, params_dtype=torch.bfloat16, bf16=True
        )
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; ms")
        eager = "bf16 fwd / f+b | onebitllms | fused, codes cached | fused, quantising"
        captured = "bf16 f+b | onebitllms | cached | quantising"
        print(f"| shape | {eager} | saved activations | in a graph: {captured} |")
        print("|---" * 10 + "|")
        results = []
        for name in arguments.shape or SHAPES:
            results.append(run(name, config))
            print(row(results[-1]), flush=True)
            torch.cuda.empty_cache()
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
