"""BitNet under tensor and sequence parallelism: its codes, and the bytes that it gathers."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multi_gpu.gathered import OTHERS, count_gathered_bytes
from benchmarks.multi_gpu.inputs import a_batch, ensure_checkpoint
from falcon_bridge.bitnet.modules import TERNARY_MODULES
from tests.parallel.variant import Variant


def ternary(layout: Variant, path: Path) -> dict[str, Any] | None:
    """BitNet's ternary codes and its loss, against data parallelism over the same ranks."""
    from falcon_bridge.verification.megatron import MegatronUnderTest

    batch, runs = a_batch(ensure_checkpoint(path), None), []
    for kind in (Variant(dp=dist.get_world_size(), fields=layout.fields), layout):
        model = MegatronUnderTest(path, kind, "bf16")
        runs.append((model.loss(batch), _codes(model)))
        model.close()
    (expected_loss, expected), (loss, codes) = runs
    differing = sum((codes[name] != code).sum().item() for name, code in expected.items())
    mismatch = differing / sum(code.numel() for code in expected.values())
    ok = mismatch < 1e-5 and abs(loss - expected_loss) < 1e-2
    return {"ok": ok, "code_mismatch": mismatch, "loss": abs(loss - expected_loss), "error": "" if ok else "differs"}


def gathered(layout: Variant, path: Path) -> dict[str, Any] | None:
    """Bytes that all-gathers bring to a rank in a forward and backward pass: BitNet against its dense bf16 twin.

    Where a ternary linear gathers its input, a token is `hidden` int8 codes and one fp32 scale instead of `hidden`
    bf16 numbers.
    """
    from falcon_bridge.verification.megatron import MegatronUnderTest

    batch = a_batch(ensure_checkpoint(path), None)
    names = tuple(module.megatron for module in TERNARY_MODULES)
    counts = {}
    for ternary in (True, False):
        fields = {**layout.fields, "use_bitnet": ternary}
        model = MegatronUnderTest(path, replace(layout, fields=fields), "bf16")
        model.loss(batch, backward=True)  # quantises the weights, and what is compiled lazily is
        with count_gathered_bytes(model.chunks, names) as counts[ternary]:
            model.loss(batch, backward=True)
        hidden = model.config.hidden_size
        model.close()
    bitnet, dense = counts[True], counts[False]
    expected = {
        name: count if name == OTHERS else count * (hidden + 4) // (2 * hidden)
        for name, count in dense.forward.items()
    }
    ok = bitnet.forward == expected and len(expected) > 1
    linears, twins = (sum(c for name, c in x.forward.items() if name != OTHERS) for x in (bitnet, dense))
    return {
        "ok": ok,
        "gathered": linears / twins,
        "gathered_in_all": (sum(bitnet.forward.values()) + bitnet.backward)
        / (sum(dense.forward.values()) + dense.backward),
        "bytes": {"bitnet": asdict(bitnet), "dense": asdict(dense)},
        "error": "" if ok else f"gathered {bitnet.forward}, expected {expected}",
    }


def _codes(model) -> dict[str, torch.Tensor]:
    """The ternary codes by Hugging Face name: they take the weights' place for the length of an export."""
    from falcon_bridge.bitnet import BitNetColumnParallelLinear, BitNetRowParallelLinear

    kinds = (BitNetColumnParallelLinear, BitNetRowParallelLinear)
    layers = [module for chunk in model.chunks for module in chunk.modules() if isinstance(module, kinds)]
    for layer in layers:
        layer.weight.data = layer.weight_codes().codes.to(layer.weight.dtype)
    return {name: tensor.clone() for name, tensor in model.export() if name.endswith("proj.weight")}
