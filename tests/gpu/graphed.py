"""Training steps of a small model through Megatron's schedule, DDP and distributed optimizer, graphed or not."""

import contextlib
import functools
import gc
from types import SimpleNamespace
from typing import Any

import torch

from tests.off import Off


SEQUENCE, ROWS, MICRO_BATCHES, STEPS, WARMUP, VOCABULARY = 256, 2, 2, 8, 2, 1021
# behind these steps; the one behind step 1 comes right before the step that is captured, the third is captured itself
VALIDATIONS = (0, 1, 3, 5)

COMMON = {
    "num_layers": 2,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 64,
    "vocab_size": VOCABULARY,
    "seq_length": SEQUENCE,
    "init_method_std": 0.05,
    "cuda_graph_warmup_steps": WARMUP,
}
SSM = {"mamba_num_heads": 8, "mamba_head_dim": 32, "mamba_state_dim": 64, "mamba_num_groups": 1, "chunk_size": 64}


def batches(step: int, apart: bool) -> list[dict[str, torch.Tensor]]:
    """A step's micro-batches as the dataset makes them, on the CPU: tokens of a step's own part of the vocabulary.

    A model that saw another step's tokens instead would have another loss: each part is learnt in the first steps that
    have it, and comes back after four.
    """
    generator = torch.Generator().manual_seed(step)
    first, width = 200 * (step % 4), 150
    made = []
    for _ in range(MICRO_BATCHES):
        tokens = first + torch.randint(width, (ROWS, SEQUENCE + 1), generator=generator)
        batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": (torch.rand(ROWS, SEQUENCE, generator=generator) < 0.9).float(),
            "position_ids": torch.arange(SEQUENCE).repeat(ROWS, 1),
        }
        if apart:
            borders = torch.full((ROWS, SEQUENCE + 1), SEQUENCE, dtype=torch.int32)
            for row in range(ROWS):
                inner = torch.randperm(SEQUENCE - 1, generator=generator)[: 3 * (step % 4) + row] + 1
                borders[row, 0], borders[row, 1 : 1 + len(inner)] = 0, inner.sort().values
            batch |= {"cu_seqlens": borders, "max_seqlen": borders.diff(dim=1).amax(1)}
        made.append(batch)
    return made


@contextlib.contextmanager
def graph_safe_rank():
    """Megatron's groups and random number streams, as Bridge sets them up for CUDA graphs."""
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, te_rng_tracker=True, force_reset_rng=True)
    try:
        yield
    finally:
        destroy_rerun_state_machine()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        parallel_state.destroy_model_parallel()


def run(family: str, fields: dict[str, Any], *, graphed: bool, apart: bool) -> dict[str, Any]:
    """Losses of steps and validations, sums of squared lengths, and the weights after the last step."""
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    import falcon_bridge
    from falcon_bridge.training.cuda_graph import GraphedIterations
    from falcon_bridge.training.forward_step import forward_step

    with graph_safe_rank():
        torch.manual_seed(0)
        provider = getattr(falcon_bridge, f"{family}ModelProvider")(
            **COMMON,
            **fields,
            cuda_graph_impl="full_iteration" if graphed else "none",
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
        )
        provider.finalize()
        model = provider.provide_distributed_model(
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=True,
                check_for_nan_in_grad=False,
            ),
            data_parallel_random_init=False,
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=2e-3,
                bf16=True,
                params_dtype=torch.bfloat16,
                use_distributed_optimizer=True,
                clip_grad=1.0,
            ),
            model,
        )
        config = model[0].config
        config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
        config.no_sync_func = model[0].no_sync
        state = run_state(provider, apart)
        schedule, callback = get_forward_backward_func(), GraphedIterations()
        train = FullCudaGraphWrapper(schedule, WARMUP) if graphed else schedule
        validate = FullCudaGraphWrapper(schedule, WARMUP) if graphed else schedule
        callback.on_train_start(SimpleNamespace(state=state))

        def losses_of(function, step: int, forward_only: bool) -> torch.Tensor:
            found = function(
                forward_step_func=functools.partial(forward_step, state),
                data_iterator=iter(batches(step, apart)),
                model=model,
                num_microbatches=MICRO_BATCHES,
                seq_length=SEQUENCE,
                micro_batch_size=ROWS,
                forward_only=forward_only,
            )
            total = torch.stack([part["lm loss"] for part in found]).sum(0)
            return total[0] / total[1]

        result: dict[str, Any] = {"losses": [], "validations": [], "squares": []}
        for step in range(STEPS):
            state.train_state.step = step
            model[0].zero_grad_buffer()
            optimizer.zero_grad()
            state._flops_seqlen_sum = state._flops_seqlen_sq_sum = 0
            state._flops_requires_global_reduce = False
            result["losses"].append(float(losses_of(train, step, False)))
            _, norm, _ = optimizer.step()
            callback.on_train_step_end(SimpleNamespace(state=state, grad_norm=float(norm)))
            result["squares"].append(int(state._flops_seqlen_sq_sum))
            if step in VALIDATIONS:
                model[0].eval()
                with torch.no_grad():
                    result["validations"].append(float(losses_of(validate, step + 1, True)))
                model[0].train()
        graphs = [FullCudaGraphWrapper.cuda_graph[stage] is not None for stage in ("training", "validation")]
        result["graphs"] = graphs
        result["weights"] = {name: weight.detach().float().cpu() for name, weight in model[0].named_parameters()}
        callback.on_train_end(SimpleNamespace(state=state))
    return result


def run_state(provider, apart: bool) -> SimpleNamespace:
    """What `forward_step` reads of a run's state."""
    return SimpleNamespace(
        cfg=SimpleNamespace(
            dataset=SimpleNamespace(inter_document_masking=apart, skip_getting_attention_mask_from_dataset=True),
            model=provider,
            rerun_state_machine=SimpleNamespace(check_for_nan_in_loss=False, check_for_spiky_loss=False),
        ),
        train_state=SimpleNamespace(step=0),
        timers=Off(),
        straggler_timer=Off(),
    )


def both(family: str, fields: dict[str, Any], apart: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """`run` without and with CUDA graphs."""
    results = []
    for graphed in (False, True):
        results.append(run(family, fields, graphed=graphed, apart=apart))
        gc.collect()
        torch.cuda.empty_cache()
    return tuple(results)
