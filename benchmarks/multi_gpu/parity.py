"""Every layout against stock transformers on the same GPUs, as `falcon-bridge verify --train-step` compares them.

In bf16 two implementations round independently: what is compared there is how far each is from transformers in fp32.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multi_gpu.cases import Case
from falcon_bridge.verification.batch import Batch, random_batch
from falcon_bridge.verification.checkpoints import write_random_checkpoint
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.parity import compare, compare_tensors
from falcon_bridge.verification.reference import Outcome, TrainSteps, transformers_outcome
from falcon_bridge.verification.roundtrip import mismatched_tensors
from tests.parallel.variant import Variant, identify


# heads of 32, state and chunk of 64: the only shape that mamba-ssm's kernels compile for here
KERNEL_SHAPE = {"mamba_n_heads": 8, "mamba_d_ssm": 256, "mamba_d_state": 64, "mamba_chunk_size": 64}
CHECKPOINTS = {
    "one group": ("gated_norm", {"num_hidden_layers": 4, "intermediate_size": 96, **KERNEL_SHAPE}),
    "two groups, tied": (
        "groups2_gated_norm",
        {"num_hidden_layers": 4, "intermediate_size": 96, "tie_word_embeddings": True, **KERNEL_SHAPE},
    ),
}
# multiples of 2·cp, of which Transformer Engine cuts each; two cross a border of chunks
DOCUMENTS = (72, 4, 20, 64)
ROWS = 4
BF16_SLACK = 1.3
SSM_ONLY = {"layer_pattern": "M-M-"}

_references: dict[tuple, Outcome] = {}


def cases(world_size: int, directory: Path, *, on_gpu: bool) -> list[Case]:
    """The cases for this many ranks; writes their checkpoints to `directory`."""
    paths = {}
    for name, (config, overrides) in CHECKPOINTS.items():
        paths[name] = write_random_checkpoint(directory / name.replace(" ", "_"), config, seed=3, **overrides)
    one, two = paths.values()
    found = []

    def add(layout: ParallelLayout, path: Path, dtype: str, packed: bool = False, skip: str | None = None) -> None:
        about = [identify(layout), dtype, "packed" if packed else "", "two groups, tied" if path == two else ""]
        found.append(Case(", ".join(filter(None, about)), against_transformers, (layout, path, dtype, packed), skip))

    needs_gpu = None if on_gpu else "context-parallel attention needs Transformer Engine, so GPUs"
    for dtype in ("fp32", "bf16"):
        for layout in _layouts(world_size):
            add(layout, one, dtype)
        add(_layouts(world_size)[1], one, dtype, packed=True)
    add(_layouts(world_size)[1], two, "fp32")
    add(ParallelLayout(pp=2, dp=world_size // 2), two, "fp32")
    contexts = [ParallelLayout(cp=2)] if world_size == 2 else [ParallelLayout(tp=2, cp=2, sequence_parallel=True)]
    for layout in contexts:
        add(layout, one, "bf16", skip=needs_gpu)
        add(layout, one, "bf16", packed=True, skip=needs_gpu)
        add(layout, two, "bf16", skip=needs_gpu)
        ssm = Variant(layout.tp, cp=2, sequence_parallel=layout.sequence_parallel, fields=SSM_ONLY)
        found.append(Case(f"{identify(layout)}, fp32, SSM branch alone", against_data_parallel, (ssm, one)))
    bitnet = Variant(tp=world_size, sequence_parallel=True, fields={"use_bitnet": True})
    found.append(Case(f"{identify(bitnet)}, bf16, BitNet", ternary, (bitnet, one)))
    return found


def _layouts(world_size: int) -> list[ParallelLayout]:
    if world_size == 2:
        return [
            ParallelLayout(tp=2),
            ParallelLayout(tp=2, sequence_parallel=True),
            ParallelLayout(pp=2),
            ParallelLayout(pp=2, vp=2),
            ParallelLayout(dp=2, distributed_optimizer=True),
        ]
    return [
        ParallelLayout(tp=4),
        ParallelLayout(tp=4, sequence_parallel=True),
        ParallelLayout(tp=2, pp=2),
        ParallelLayout(tp=2, pp=2, vp=2, sequence_parallel=True),
        ParallelLayout(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True),
    ]


def a_batch(path: Path, packed: bool) -> Batch:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    rows = random_batch(config, batch_size=ROWS, seq_length=sum(DOCUMENTS), seed=4)
    return Batch(rows.tokens, DOCUMENTS) if packed else rows


def reference(path: Path, dtype: torch.dtype, packed: bool, train: TrainSteps | None) -> Outcome:
    """What transformers computes, once for each of these; called on rank 0."""
    key = path, dtype, packed, train
    if key not in _references:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batch = a_batch(path, packed)
        _references[key] = transformers_outcome(path, batch, dtype=dtype, device=device, gradients=True, train=train)
    return _references[key]


def against_transformers(layout: ParallelLayout, path: Path, dtype: str, packed: bool) -> dict[str, Any] | None:
    """Logits, loss, gradients, the export, and in fp32 the weights after five steps."""
    from falcon_bridge.verification.megatron import megatron_outcome

    first, batch = dist.get_rank() == 0, a_batch(path, packed)
    train = TrainSteps() if dtype == "fp32" and not packed else None
    if first:
        truth = reference(path, torch.float32, packed, train)
        theirs = None if dtype == "fp32" else reference(path, torch.bfloat16, packed, None)
    dist.barrier()
    model = _model(path, layout, dtype, packed)
    compared, mismatched = mismatched_tensors(path, model.export())
    if packed and layout.cp > 1:
        # rows are cut document by document, so their logits are not put together again
        loss, gradients = model.gradients(batch)
        ours = Outcome(torch.empty(0), loss, gradients)
    else:
        ours = megatron_outcome(model, batch, gradients=True, train=train)
    model.close()
    if not first:
        return None
    if dtype == "bf16":
        row = _bf16_row(ours, theirs, truth)
    else:
        about = {"params_compared": compared, "mismatched": mismatched, "layout": {}, "dtype": dtype, "seconds": 0.0}
        result = compare(truth, ours, **about)
        row = {
            "ok": result.ok,
            "logits": result.max_abs_logit_diff / result.max_abs_logit,
            "loss": abs(result.loss_hf - result.loss_megatron),
            "gradients": result.max_rel_grad_diff,
            "weights": result.max_rel_weight_diff,
            "error": "; ".join(result.findings[:3]),
        }
    if mismatched:
        row |= {"ok": False, "error": f"{len(mismatched)} tensors changed by the round trip"}
    return row


def _model(path: Path, layout: ParallelLayout, dtype: str, packed: bool):
    from falcon_bridge.verification.megatron import MegatronUnderTest

    if packed and layout.cp > 1:
        return _packed_under_context_parallelism()(path, layout, dtype)
    return MegatronUnderTest(path, layout, dtype)


def _packed_under_context_parallelism():
    from megatron.bridge.training.utils.packed_seq_utils import get_thd_cp_partition_indices
    from megatron.core import parallel_state

    from falcon_bridge.verification.megatron import MegatronUnderTest

    class PackedUnderContextParallelism(MegatronUnderTest):
        """Cuts packed rows with the function that Megatron Bridge's `gpt_step` cuts them with."""

        def _microbatch(self, batch: Batch, row: int, size: int) -> dict:
            layout, self.layout = self.layout, replace(self.layout, cp=1)
            try:
                whole = super()._microbatch(batch, row, size)
            finally:
                self.layout = layout
            packed = whole.pop("packed_seq_params")
            index = get_thd_cp_partition_indices(
                packed.cu_seqlens_q,
                total_tokens=batch.tokens.shape[1],
                cp_group=parallel_state.get_context_parallel_group(),
                device=packed.cu_seqlens_q.device,
            )
            cut = {name: None if value is None else value[:, index].contiguous() for name, value in whole.items()}
            # which gpt_step counts after the cut
            return {**cut, "packed_seq_params": replace(packed, total_tokens=len(index), seq_idx=None)}

    return PackedUnderContextParallelism


def _bf16_row(ours: Outcome, theirs: Outcome, truth: Outcome) -> dict[str, Any]:
    """Distances from fp32, ours and transformers'."""
    figures = {"gradients": (_flat(ours.gradients), _flat(theirs.gradients), _flat(truth.gradients))}
    if ours.logits.numel():
        figures["logits"] = ours.logits, theirs.logits, truth.logits
    row: dict[str, Any] = {"ok": True, "error": "", "loss": abs(ours.loss - truth.loss)}
    for name, (got, other, expected) in figures.items():
        distance, limit = _distance(got, expected), BF16_SLACK * _distance(other, expected)
        row |= {name: distance, f"{name}_of_transformers": limit / BF16_SLACK}
        if not distance <= limit:
            row |= {"ok": False, "error": f"{name} are {distance:.2g} from fp32, the limit is {limit:.2g}"}
    if not row["loss"] <= 0.01:
        row |= {"ok": False, "error": f"the loss is {row['loss']:.2g} nats from fp32"}
    return row


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).double().norm() / expected.double().norm()).item()


def _flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def against_data_parallel(layout: Variant, path: Path) -> dict[str, Any] | None:
    """Loss and gradients in fp32 against data parallelism over the same ranks, whose every rank has a whole model."""
    from falcon_bridge.verification.megatron import MegatronUnderTest

    batch = a_batch(path, packed=False)
    runs = []
    for kind in (Variant(dp=dist.get_world_size(), fields=layout.fields), layout):
        model = MegatronUnderTest(path, kind)
        runs.append(model.gradients(batch))
        model.close()
    (expected_loss, expected), (loss, gradients) = runs
    worst = max(compare_tensors(expected, gradients).values())
    difference = abs(loss - expected_loss)
    ok = difference <= 2e-6 and worst <= 1e-4
    return {"ok": ok, "loss": difference, "gradients": worst, "error": "" if ok else "differs from data parallelism"}


def ternary(layout: Variant, path: Path) -> dict[str, Any] | None:
    """BitNet's ternary codes and its loss, against data parallelism over the same ranks."""
    from falcon_bridge import FalconH1ModelProvider
    from falcon_bridge.verification.megatron import MegatronUnderTest

    if not hasattr(FalconH1ModelProvider, "use_bitnet"):
        return {"ok": None, "error": "FalconH1ModelProvider has no use_bitnet"}
    batch, runs = a_batch(path, packed=False), []
    for kind in (Variant(dp=dist.get_world_size(), fields=layout.fields), layout):
        model = MegatronUnderTest(path, kind, "bf16")
        runs.append((model.loss(batch), _codes(model)))
        model.close()
    (expected_loss, expected), (loss, codes) = runs
    differing = sum((codes[name] != code).sum().item() for name, code in expected.items())
    mismatch = differing / sum(code.numel() for code in expected.values())
    ok = mismatch < 1e-5 and abs(loss - expected_loss) < 1e-2
    return {"ok": ok, "code_mismatch": mismatch, "loss": abs(loss - expected_loss), "error": "" if ok else "differs"}


def _codes(model) -> dict[str, torch.Tensor]:
    """The ternary codes by Hugging Face name: they take the weights' place for the length of an export."""
    from falcon_bridge.bitnet import BitNetColumnParallelLinear, BitNetRowParallelLinear

    kinds = (BitNetColumnParallelLinear, BitNetRowParallelLinear)
    layers = [module for chunk in model.chunks for module in chunk.modules() if isinstance(module, kinds)]
    for layer in layers:
        layer.weight.data = layer.weight_codes().codes.to(layer.weight.dtype)
    return {name: tensor.clone() for name, tensor in model.export() if name.endswith("proj.weight")}
