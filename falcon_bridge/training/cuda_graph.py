"""Whole iterations as CUDA graphs (``model.cuda_graph_impl=full_iteration``): what a run needs, and must not do.

Megatron captures forward and backward of all micro-batches of a step once, after ``model.cuda_graph_warmup_steps``
ordinary ones, and replays them from then on; optimizer, data and logging stay outside. A replay runs no Python: it
reads each step's batch from the same buffers, with the same shapes, and what it computes stays on the device.
"""

import math
import os
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core import full_cuda_graph
from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

from falcon_bridge.errors import UserError
from falcon_bridge.training.document_counts import length_frequencies
from falcon_bridge.training.static_documents import static_documents


FULL_ITERATION = "full_iteration"

# Megatron captures the iteration of a certain number, counted from 0
_BEYOND_CAPTURE = 2**40
_FLOPS_STATISTICS = ("_flops_seqlen_sum", "_flops_seqlen_sq_sum", "_flops_requires_global_reduce")


def is_captured(cfg: Any) -> bool:
    """Whether the iterations of a ``ConfigContainer`` become CUDA graphs."""
    return getattr(cfg.model, "cuda_graph_impl", "none") == FULL_ITERATION


def settle_cuda_graph(cfg: Any) -> None:
    """Turn off what would wait for the device within an iteration, and refuse what cannot be captured.

    Without CUDA graphs nothing is changed. The model itself is checked by its `finalize`
    (`models.build.check_cuda_graph`).

    Args:
        cfg: a ``ConfigContainer``, all overrides applied; changed in place.

    Raises:
        UserError: with one line that names the key and says what to change.
    """
    if not is_captured(cfg):
        return
    for key, (refused, reason) in _refused(cfg).items():
        if refused:
            raise UserError(f"model.cuda_graph_impl={FULL_ITERATION} cannot be had with {key}: {reason}")
    # these look at numbers on the host; `GraphedIterations` looks at the norm of the gradient instead
    cfg.rerun_state_machine.check_for_nan_in_loss = cfg.rerun_state_machine.check_for_spiky_loss = False
    cfg.ddp.check_for_nan_in_grad = cfg.ddp.check_for_large_grads = False
    cfg.rng.te_rng_tracker = True


def _refused(cfg: Any) -> dict[str, tuple[Any, str]]:
    import torch
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig

    model, on_gpu = cfg.model, torch.cuda.is_available()
    eager = "set model.cuda_graph_impl=none"
    apart = getattr(cfg.dataset, "inter_document_masking", False)
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    straggler = cfg.straggler is not None and getattr(cfg.straggler, "log_straggler", False)
    return {
        f"dist.distributed_backend={cfg.dist.distributed_backend}": (
            cfg.dist.distributed_backend == "gloo",
            f"CUDA graphs need a GPU, and this recipe is for the CPU: {eager}",
        ),
        "packed chats": (
            isinstance(cfg.dataset, GPTSFTDatasetConfig) or cfg.peft is not None,
            f"the borders of packed rows are looked at on the host, and adapters come with them: {eager}",
        ),
        "model.transformer_impl=local": (
            on_gpu and model.transformer_impl != "transformer_engine",
            f"Megatron's own layers wait for the device: set it to transformer_engine, or {eager}",
        ),
        "model.apply_rope_fusion=false": (
            on_gpu and apart and not model.apply_rope_fusion,
            "the rotations of packed documents are then looked up on the host: set it to true, or "
            "dataset.inter_document_masking=false",
        ),
        "ddp.use_megatron_fsdp=true": (cfg.ddp.use_megatron_fsdp, f"set it to false, or {eager}"),
        "optimizer.optimizer_cuda_graph=true": (
            cfg.optimizer.optimizer_cuda_graph,
            "the optimizer's step is outside of the graph: set it to false",
        ),
        f"logger.timing_log_level={cfg.logger.timing_log_level}": (
            cfg.logger.timing_log_level > 0,
            "timers within the iteration wait for the device: set it to 0",
        ),
        "expandable_segments:True": (
            "expandable_segments:True" in allocator and os.environ.get("NCCL_GRAPH_REGISTER") != "0",
            "NCCL would register memory that can move: set the environment variable NCCL_GRAPH_REGISTER=0",
        ),
        "optimizer.clip_grad=0": (
            not cfg.optimizer.clip_grad,
            "the gradient's norm would not be computed, and nothing else is checked for NaN: set it above 0",
        ),
        "straggler.log_straggler=true": (straggler, "it times parts of the iteration: set it to false"),
        "train.rampup_batch_size": (
            cfg.train.rampup_batch_size,
            f"an iteration has the same number of micro-batches throughout: unset it, or {eager}",
        ),
        "train.decrease_batch_size_if_needed=true": (
            cfg.train.decrease_batch_size_if_needed,
            "an iteration has the same number of micro-batches throughout: set it to false",
        ),
    }


class GraphedIterations(Callback):
    """Does around each step what a replay cannot: counts FLOPs, and raises where the step is not to be trusted.

    Megatron keeps its graphs for the whole process: they are dropped before a training, so that a second one in the
    same process has its own, and once a training is over, since they hold on to communicators.
    """

    def __init__(self) -> None:
        self._statistics: dict[str, Any] | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Start without graphs."""
        self._statistics = None
        forget_graphs()
        static_documents.start(length_frequencies(context.state.cfg))

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Have the step gather the optimizer's shards of the parameters within its forward pass, where it overlaps.

        Validations and checkpoints gather them at once, and the next forward pass does without. If it is the one that
        is captured, no replay would ever gather them.
        """
        if context.state.cfg.ddp.overlap_param_gather and FullCudaGraphWrapper.cuda_graph["training"] is None:
            for chunk in context.model:
                chunk.reset_param_sync_dispatch_state()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Check the step, before anything of it is saved, and give Bridge its statistics of sequence lengths.

        Raises:
            ValueError: the norm of the gradient is not finite, or a batch had more documents than the graph takes.
        """
        static_documents.check()
        norm = context.grad_norm
        if norm is not None and not math.isfinite(norm):
            raise ValueError(
                f"the gradient's norm is {float(norm)} in step {context.state.train_state.step + 1}: go on from the "
                "last checkpoint with a lower optimizer.lr, or with model.cuda_graph_impl=none, which checks the loss "
                "of each micro-batch"
            )
        if FullCudaGraphWrapper.cuda_graph.get("training") is None:
            return
        # Bridge's forward step adds them up in Python; the capture made them, partly on the device, where replays
        # bring them up to date
        if self._statistics is None:
            self._statistics = {name: getattr(context.state, name) for name in _FLOPS_STATISTICS}
        for name, value in self._statistics.items():
            setattr(context.state, name, value)

    def on_eval_end(self, context: CallbackContext) -> None:
        """Check the validation's documents."""
        static_documents.check()

    def on_test_end(self, context: CallbackContext) -> None:
        """As `on_eval_end`."""
        self.on_eval_end(context)

    def on_train_end(self, context: CallbackContext) -> None:
        """Drop the graphs, and have none for the evaluations that follow."""
        forget_graphs()
        FullCudaGraphWrapper.curr_iteration["validation"] = _BEYOND_CAPTURE


def forget_graphs() -> None:
    """What ``FullCudaGraphWrapper.reset_cuda_graph`` does, and also where a graph has been deleted already.

    Their memory pool is forgotten with them: PyTorch lets nothing be captured into one whose last graph is gone.
    """
    full_cuda_graph._shared_graph_pool = None
    for stage in ("training", "validation"):
        FullCudaGraphWrapper.cuda_graph[stage] = FullCudaGraphWrapper.result[stage] = None
        FullCudaGraphWrapper.curr_iteration[stage] = 0
        StaticBufferLoader.static_buffers[stage].clear()
