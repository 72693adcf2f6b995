"""Every layout against stock transformers on the same GPUs, as `falcon-bridge verify --train-step` compares them.

In bf16 two implementations round independently: what is compared there is how far each is from transformers in fp32.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multi_gpu.cases import Case
from benchmarks.multi_gpu.inputs import CHECKPOINTS, DOCUMENTS, ODD_DOCUMENTS, a_batch, ensure_checkpoint
from benchmarks.multi_gpu.ternary import gathered, ternary
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.parity import compare, compare_tensors
from falcon_bridge.verification.reference import Outcome, TrainSteps, transformers_outcome
from falcon_bridge.verification.roundtrip import mismatched_tensors
from tests.parallel.variant import Variant, identify


BF16_SLACK = 1.3
SSM_ONLY = {"layer_pattern": "M-M-"}
SPLIT_HEADS = {"cp_comm_type": "a2a"}

_references: dict[tuple, Outcome] = {}


def cases(world_size: int, directory: Path, *, on_gpu: bool) -> list[Case]:
    """The cases for this many ranks, first what only GPUs can run; their checkpoints go to `directory`."""
    one, two = (directory / name.replace(" ", "_") for name in CHECKPOINTS)
    found = []

    def add(layout: ParallelLayout, path: Path, dtype: str, packed: bool = False, skip: str | None = None) -> None:
        split = "heads split" if isinstance(layout, Variant) else ""
        about = [identify(layout), split, dtype, "packed" if packed else "", "two groups, tied" if path == two else ""]
        found.append(Case(", ".join(filter(None, about)), against_transformers, (layout, path, dtype, packed), skip))

    needs_gpu = None if on_gpu else "context-parallel attention needs Transformer Engine, so GPUs"
    layouts, sequence_parallel = _layouts(world_size), ParallelLayout(tp=world_size, sequence_parallel=True)
    context = ParallelLayout(tp=world_size // 2, cp=2, sequence_parallel=world_size > 2)
    # what compiles the same kernels stands together
    add(context, one, "bf16", skip=needs_gpu)
    add(context, two, "bf16", skip=needs_gpu)
    bitnet = Variant(tp=world_size, sequence_parallel=True, fields={"use_bitnet": True})
    found.append(Case(f"{identify(bitnet)}, bf16, BitNet", ternary, (bitnet, one)))
    found.append(Case(f"{identify(bitnet)}, bf16, bytes gathered by BitNet", gathered, (bitnet, one)))
    for layout in layouts:
        add(layout, one, "bf16")
    add(context, one, "bf16", packed=True, skip=needs_gpu)
    add(sequence_parallel, one, "bf16", packed=True)
    for layout in layouts:
        add(layout, one, "fp32")
    add(sequence_parallel, two, "fp32")
    add(ParallelLayout(pp=2, dp=world_size // 2), two, "fp32")
    heads = Variant(context.tp, cp=2, sequence_parallel=context.sequence_parallel, fields=SPLIT_HEADS)
    add(heads, one, "fp32")
    add(heads, one, "fp32", packed=True)
    ssm = Variant(context.tp, cp=2, sequence_parallel=context.sequence_parallel, fields=SSM_ONLY)
    found.append(Case(f"{identify(ssm)}, fp32, SSM branch alone", against_data_parallel, (ssm, one)))
    add(sequence_parallel, one, "fp32", packed=True)
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


def reference(
    path: Path, dtype: torch.dtype, documents: tuple[int, ...] | None, train: TrainSteps | None = None
) -> Outcome:
    """What transformers computes, once for each of these; called on rank 0.

    On the GPU where there is one: beside mamba-ssm, recent releases of transformers call its kernels for a model on
    the CPU as well.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    key = path, dtype, documents, train
    if key not in _references:
        batch = a_batch(path, documents)
        _references[key] = transformers_outcome(path, batch, dtype=dtype, device=device, gradients=True, train=train)
    return _references[key]


def against_transformers(layout: ParallelLayout, path: Path, dtype: str, packed: bool) -> dict[str, Any] | None:
    """Logits, loss, gradients, the export, and in fp32 the weights after five steps."""
    from falcon_bridge.verification.megatron import megatron_outcome

    splits_heads = isinstance(layout, Variant)
    documents = None if not packed else ODD_DOCUMENTS if splits_heads else DOCUMENTS
    batch = a_batch(ensure_checkpoint(path), documents)
    train = TrainSteps() if dtype == "fp32" and not packed else None
    model = _model(path, layout, dtype, packed)
    compared, mismatched = mismatched_tensors(path, model.export())
    if packed and layout.cp > 1 and not splits_heads:
        # rows are cut document by document, so their logits are not put together again
        loss, gradients = model.gradients(batch)
        ours = Outcome(torch.empty(0), loss, gradients)
    else:
        ours = megatron_outcome(model, batch, gradients=True, train=train)
    model.close()
    if dist.get_rank():
        return None
    # last, so that no rank waits in a collective for one that fails in it
    truth = reference(path, torch.float32, documents, train)
    if dtype == "bf16":
        row = _bf16_row(ours, reference(path, torch.bfloat16, documents), truth)
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
        return _packed_under_context_parallelism(isinstance(layout, Variant))(path, layout, dtype)
    return MegatronUnderTest(path, layout, dtype)


def _packed_under_context_parallelism(splits_heads: bool):
    from megatron.bridge.training.gpt_step import get_packed_seq_params
    from megatron.core import parallel_state

    from falcon_bridge.training.context_parallel import cut_packed_batch, marked, rows_cut_whole
    from falcon_bridge.verification.megatron import MegatronUnderTest

    class PackedUnderContextParallelism(MegatronUnderTest):
        """Cuts packed rows as our step does in pretraining with split heads, else as Megatron Bridge's `gpt_step`."""

        def _cut(self, rows: dict, packed):
            longest = torch.tensor([packed.max_seqlen_q])
            borders = {
                "cu_seqlens_q": packed.cu_seqlens_q[None],
                "cu_seqlens_kv": packed.cu_seqlens_kv[None],
                "max_seqlen_q": longest,
                "max_seqlen_kv": longest,
            }
            with rows_cut_whole() if splits_heads else nullcontext():
                whole = {**rows, "attention_mask": None, **borders}
                cut = cut_packed_batch(whole, parallel_state.get_context_parallel_group())
                own = {name: cut.pop(name) for name in borders}
                return {name: cut[name] for name in rows}, marked(get_packed_seq_params(own))

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

    batch = a_batch(ensure_checkpoint(path), None)
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
