"""Verification of one checkpoint under one layout, on ranks that it starts itself."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from falcon_bridge.errors import UserError
from falcon_bridge.ranks import emit, run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.parity import ParityResult


STAGES = (
    "checking the files",
    "importing Megatron",
    "running transformers",
    "loading into Megatron",
    "comparing the weights",
    "running Megatron",
)


@dataclass(frozen=True)
class VerifyRequest:
    """What to verify.

    Attributes:
        hf: Hugging Face checkpoint directory, or a hub id.
        layout: parallel layout of the Megatron side.
        megatron: Megatron checkpoint directory; None converts `hf`.
        dtype: ``"fp32"`` or ``"bf16"``, of both sides.
        seq_length: tokens a row.
        batch_size: rows of the global batch; None takes the smallest that the layout allows, at least 2.
        packed: rows hold several documents; transformers sees each alone.
        train_step: also compare all gradients, and the weights after a few optimizer steps.
        seed: of the tokens.
    """

    hf: str | Path
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    megatron: Path | None = None
    dtype: str = "fp32"
    seq_length: int = 128
    batch_size: int | None = None
    packed: bool = False
    train_step: bool = False
    seed: int = 0

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        if self.batch_size is not None:
            return self.batch_size
        rows = self.layout.dp * (self.layout.pp if self.layout.pp > 1 else 1)
        return max(2, rows)


def verify(
    request: VerifyRequest,
    *,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ParityResult:
    """Compare a checkpoint in Megatron with stock transformers: logits, loss, round trip, gradients.

    Starts ``request.layout.world_size`` ranks: gloo on CPU, NCCL on GPU.

    Args:
        request: what to verify.
        on_stage: called with each of `STAGES` as it begins.

    Raises:
        UserError: what the layout, the batch or the checkpoint cannot do.
        JobError: a rank failed.
    """
    from falcon_bridge.conversion.hf_checkpoint import check_checkpoint
    from falcon_bridge.conversion.megatron_checkpoint import find_megatron_checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = check_checkpoint(request.hf, values=False).path
    iteration = find_megatron_checkpoint(request.megatron).iteration_dir if request.megatron else None
    check_request(replace(request, hf=path), device)
    on_stage(STAGES[0])
    check_checkpoint(path)
    on_stage(STAGES[1])
    if device == "cuda" and request.dtype == "fp32":
        use_full_precision(os.environ.__setitem__)
    elif device == "cpu":
        import falcon_bridge.verification.megatron  # noqa: F401  once, here: the ranks are forked
        from falcon_bridge.conversion.runtime import preload

        preload()
    return run_ranks(
        _verify_rank,
        request.layout.world_size,
        replace(request, hf=path, megatron=iteration),
        device=device,
        on_event=lambda rank, stage: on_stage(stage),
    )[0]


def use_full_precision(set_environment: Callable[[str, str], None]) -> None:
    """Switch TF32 off for processes started from here on; what has loaded the libraries already does not notice.

    Transformer Engine asks cuBLAS for TF32 in fp32, and Triton's dot takes it by default.

    Args:
        set_environment: takes the name and the value of an environment variable.
    """
    set_environment("NVIDIA_TF32_OVERRIDE", "0")
    set_environment("TRITON_F32_DEFAULT", "ieee")


def check_request(request: VerifyRequest, device: str) -> None:
    """Refuse what cannot be verified, before any model is made; ``request.hf`` must be a directory.

    Raises:
        UserError: with what to change.
    """
    from transformers import AutoConfig

    if request.dtype not in ("fp32", "bf16"):
        raise UserError(f"--dtype must be fp32 or bf16, not {request.dtype}")
    if request.seq_length < 2:
        raise UserError(f"--seq-length must be at least 2, not {request.seq_length}")
    if request.rows < 1:
        raise UserError(f"--batch-size must be at least 1, not {request.batch_size}")
    if request.packed and request.layout.cp > 1:
        raise UserError("--packed with --cp above 1 is not supported: verify them one at a time")
    if request.dtype == "fp32" and request.layout.cp > 1 and device == "cuda":
        raise UserError("--cp above 1 needs --dtype bf16: Transformer Engine's attention has no fp32 kernel for it")
    if request.packed and request.seq_length < 8:
        raise UserError("--packed needs rows of at least 8 tokens: raise --seq-length")
    config = AutoConfig.from_pretrained(request.hf)
    request.layout.check(config, seq_length=request.seq_length, batch_size=request.rows, device=device)


def _verify_rank(request: VerifyRequest) -> ParityResult | None:
    """The work of one rank; the result on rank 0, None on the others."""
    from transformers import AutoConfig

    from falcon_bridge.compat import cpu_runtime
    from falcon_bridge.conversion.bitnet_config import is_bitnet
    from falcon_bridge.verification.megatron import DTYPES, MegatronUnderTest, megatron_outcome
    from falcon_bridge.verification.parity import compare, tolerances_for
    from falcon_bridge.verification.reference import TrainSteps, transformers_outcome
    from falcon_bridge.verification.roundtrip import mismatched_tensors

    start, first = time.perf_counter(), torch.distributed.get_rank() == 0
    torch.backends.cudnn.allow_tf32 = False
    config = AutoConfig.from_pretrained(request.hf)
    batch = random_batch(
        config,
        batch_size=request.rows,
        seq_length=request.seq_length,
        seed=request.seed,
        packed=request.packed,
    )
    # rounding makes bf16 weights differ after a step or two in any two implementations
    train = TrainSteps() if request.train_step and request.dtype == "fp32" else None
    wanted = {"gradients": request.train_step, "train": train}
    if first:
        emit(STAGES[2])
        reference = transformers_outcome(
            request.hf,
            batch,
            dtype=DTYPES[request.dtype],
            device="cuda" if torch.cuda.is_available() else "cpu",
            **wanted,
        )
        torch.cuda.empty_cache()
    torch.distributed.barrier()
    with cpu_runtime():
        if first:
            emit(STAGES[3])
        model = MegatronUnderTest(request.hf, request.layout, request.dtype, request.megatron)
        ternary = getattr(model.config, "use_bitnet", False)
        if ternary != is_bitnet(config):
            raise UserError(
                f"{request.megatron} has use_bitnet={ternary}, but {request.hf} {'lacks' if ternary else 'has'} "
                "BitNet's marks, so transformers would compute another model: verify against an export of the "
                "Megatron checkpoint (a ternary Falcon-H1 cannot be verified, see docs/bitnet.md)"
            )
        if first:
            emit(STAGES[4])
        compared, mismatched = mismatched_tensors(request.hf, model.export())
        if first:
            emit(STAGES[5])
        outcome = megatron_outcome(model, batch, **wanted)
        model.close()
    if not first:
        return None
    return compare(
        reference,
        outcome,
        params_compared=compared,
        mismatched=mismatched,
        layout=request.layout.describe(),
        dtype=request.dtype,
        seconds=time.perf_counter() - start,
        tolerances=tolerances_for(request.dtype, is_bitnet(config)),
    )
