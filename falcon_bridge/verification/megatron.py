"""What Megatron computes on a batch under a parallel layout, in Hugging Face's terms.

Every function here is collective: all ranks of the default process group call it. Models go through Megatron's own
schedules, distributed data parallel wrapper, gradient finalisation and optimizer, as in training.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.bridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config

from falcon_bridge.bitnet.codes import invalidate
from falcon_bridge.conversion.bitnet_config import is_bitnet
from falcon_bridge.conversion.runtime import prepare_provider
from falcon_bridge.verification.batch import Batch
from falcon_bridge.verification.gather import gather_gradients, gather_logits, sum_over_ranks
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.reference import Outcome, TrainSteps, working_dtype


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class MegatronUnderTest:
    """A Megatron model under a layout, with a batch's worth of its schedule.

    Args:
        hf: Hugging Face checkpoint directory.
        layout: what the ranks do; its `world_size` must be the process group's.
        dtype: ``"fp32"`` or ``"bf16"``; what is not a BitNet linear may be wider, see `reference.working_dtype`.
        checkpoint: an ``iter_*`` directory of a Megatron checkpoint to take the model from, config and weights; None
            converts the Hugging Face one.
    """

    def __init__(
        self, hf: str | Path, layout: ParallelLayout, dtype: str = "fp32", checkpoint: str | Path | None = None
    ) -> None:
        self.bridge = AutoBridge.from_hf_pretrained(hf)
        # so that an export keeps what Megatron holds in fp32, gradients above all
        config = self.bridge.hf_pretrained.config
        config.dtype = torch.float32
        # from a config alone, because from a checkpoint packed weights are exported packed, which no gradient survives
        self.latent_bridge = AutoBridge.from_hf_config(config) if is_bitnet(config) else self.bridge
        self.layout = layout
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.checkpoint, self.dtype = checkpoint, DTYPES[dtype]
        self._build(working_dtype(config, self.dtype, self.device))

    def _build(self, dtype: torch.dtype) -> None:
        self.chunks = self._convert(dtype) if self.checkpoint is None else self._load(self.checkpoint, dtype)
        self.config = get_model_config(self.chunks[0])
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = None

    def _ddp_config(self) -> DistributedDataParallelConfig:
        return DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=self.layout.distributed_optimizer
        )

    def _convert(self, dtype: torch.dtype) -> list[MegatronModule]:
        provider = prepare_provider(self.bridge, self.layout, dtype, load_weights=True)
        # the mean over the tokens of the global batch, however they fall on microbatches and ranks
        provider.calculate_per_token_loss = True
        return provider.provide_distributed_model(ddp_config=self._ddp_config(), data_parallel_random_init=False)

    def _load(self, checkpoint: str | Path, dtype: torch.dtype) -> list[MegatronModule]:
        precision = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": False}
        overrides = {**self.layout.provider_fields(), **precision, "calculate_per_token_loss": True}
        modules = self.bridge.load_megatron_model(checkpoint, mp_overrides=overrides)
        if dtype == torch.float64:  # upstream takes a model of any dtype but bf16 and fp16 for fp32
            for module in modules:
                config = get_model_config(module.double())
                config.params_dtype = config.pipeline_dtype = config.autocast_dtype = dtype
        invalidate()
        return [
            DistributedDataParallel(get_model_config(module), self._ddp_config(), module, disable_bucketing=i > 0)
            for i, module in enumerate(modules)
        ]

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's tensors by Hugging Face name, whole, on CPU, on every rank; to be consumed by every rank.

        In the form of the checkpoint: where that holds packed or dequantised weights, so does this.
        """
        yield from self.bridge.export_hf_weights(self.chunks, cpu=True, show_progress=False)

    def parameters(self) -> dict[str, torch.Tensor]:
        """The parameters themselves by Hugging Face name, whole, on CPU, on every rank."""
        return dict(self.latent_bridge.export_hf_weights(self.chunks, cpu=True, show_progress=False))

    def logits(self, batch: Batch) -> torch.Tensor:
        """`[b, s, vocab]` fp32 on CPU, on every rank, without the padded vocabulary."""

        def forward_step(microbatches, model: MegatronModule):
            microbatch = next(microbatches)
            microbatch.pop("labels"), microbatch.pop("loss_mask")
            return model(**microbatch), lambda output, non_loss_data: output.detach()

        with torch.no_grad():
            outputs = self._run(forward_step, batch, forward_only=True, collect_non_loss_data=True)
        return gather_logits(outputs, batch, self._vocab_size(), self.device)

    def loss(self, batch: Batch, backward: bool = False) -> float:
        """Mean cross entropy over the tokens of the global batch, in nats; with `backward`, fills the gradients."""

        def forward_step(microbatches, model: MegatronModule):
            microbatch = next(microbatches)
            mask = microbatch["loss_mask"]

            def masked_sum(output: torch.Tensor):
                total, tokens = (output.float() * mask).sum(), mask.sum()
                return total, tokens.int(), torch.stack([total.detach().double(), tokens.double()])

            return model(**microbatch), masked_sum

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        with torch.set_grad_enabled(backward):
            sums = self._run(forward_step, batch, forward_only=not backward)
        total, tokens = sum_over_ranks(sums, self.device)
        return total / tokens

    def gradients(self, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss, and its gradients by Hugging Face name (fp32, CPU), as finalised for the optimizer.

        The gradients take the parameters' place for the length of an export: what maps a sharded weight to its
        Hugging Face tensor maps its gradient, too. A bf16 model is of no use afterwards: a change of dtype costs its
        parameters the hooks through which DDP collects gradients.
        """
        loss = self.loss(batch, backward=True)
        if self.layout.distributed_optimizer:
            gather_gradients(self.chunks)
        parameters = [p for chunk in self.chunks for p in chunk.parameters() if p.requires_grad]
        weights = [p.data for p in parameters]
        try:
            for parameter in parameters:
                parameter.data = parameter.main_grad.clone()
            return loss, self.parameters()
        finally:
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.data = weight

    def train(self, batch: Batch, train: TrainSteps) -> dict[str, torch.Tensor]:
        """The weights by Hugging Face name (fp32, CPU) after `train.steps` steps on `batch`."""
        if self.config.params_dtype == torch.float64:  # which Megatron's optimizers refuse
            self.close()
            self._build(self.dtype)
        config = OptimizerConfig(
            optimizer="adam",
            lr=train.lr,
            weight_decay=0.0,
            adam_beta1=train.betas[0],
            adam_beta2=train.betas[1],
            adam_eps=train.eps,
            clip_grad=train.clip_grad,
            bf16=self.config.bf16,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=self.layout.distributed_optimizer,
        )
        optimizer = get_megatron_optimizer(config, self.chunks)
        for _ in range(train.steps):
            optimizer.zero_grad()
            self.loss(batch, backward=True)
            optimizer.step()
        return {name: tensor.float() for name, tensor in self.parameters().items()}

    def close(self) -> None:
        """Undo the model-parallel groups, so that another layout can follow in these processes."""
        self.chunks = []
        parallel_state.destroy_model_parallel()
        unset_num_microbatches_calculator()

    def _vocab_size(self) -> int:
        return self.bridge.hf_pretrained.config.vocab_size

    def _run(self, forward_step, batch: Batch, *, forward_only: bool, collect_non_loss_data: bool = False) -> list:
        rows, seq_length = batch.tokens.shape[0] // self.layout.dp, batch.tokens.shape[1]
        micro_batch_size = 1 if batch.lengths else max(1, rows // (self.layout.pp if self.layout.pp > 1 else 1))
        microbatches = [self._microbatch(batch, row, micro_batch_size) for row in range(0, rows, micro_batch_size)]
        iterators = [iter([dict(m) for m in microbatches]) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(microbatches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )

    def _microbatch(self, batch: Batch, row: int, size: int) -> dict:
        """Keyword arguments of ``GPTModel.forward`` for `size` rows of this data-parallel rank from `row` on."""
        first = parallel_state.get_data_parallel_rank() * (batch.tokens.shape[0] // self.layout.dp) + row
        sliced = {
            "input_ids": batch.tokens,
            "position_ids": batch.position_ids,
            "labels": batch.labels,
            "loss_mask": batch.loss_mask,
        }
        sliced = {k: v[first : first + size].contiguous().to(self.device) for k, v in sliced.items()}
        packed = _packed_seq_params(batch, self.device) if batch.lengths else None
        if self.layout.cp > 1:
            sliced, packed = self._cut(sliced, packed)
        return {**sliced, "attention_mask": None, "packed_seq_params": packed}

    def _cut(
        self, rows: dict[str, torch.Tensor], packed: PackedSeqParams | None
    ) -> tuple[dict[str, torch.Tensor], PackedSeqParams | None]:
        """This context-parallel rank's part of whole rows, and their documents as it is told of them."""
        group = parallel_state.get_context_parallel_group()
        return get_batch_on_this_cp_rank(rows, is_hybrid_cp=False, cp_group=group), packed


def _packed_seq_params(batch: Batch, device: str) -> PackedSeqParams:
    """Megatron Core's description of a packed row; `total_tokens` makes it compute ``seq_idx``."""
    bounds = torch.tensor([0, *batch.documents], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(batch.documents),
        max_seqlen_kv=max(batch.documents),
        total_tokens=batch.tokens.shape[1],
    )


def megatron_outcome(
    model: MegatronUnderTest, batch: Batch, *, gradients: bool = False, train: TrainSteps | None = None
) -> Outcome:
    """Run `model` on `batch`; the counterpart of `reference.transformers_outcome`."""
    logits = model.logits(batch)
    outcome = Outcome(logits, 0.0)
    if gradients or train:
        outcome.loss, outcome.gradients = model.gradients(batch)
    else:
        outcome.loss = model.loss(batch)
    if train:
        outcome.weights = model.train(batch, train)
    return outcome
