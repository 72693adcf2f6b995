"""What the recipes of every family share: Bridge's base configurations, layout, optimizer, output, the CPU.

The one file that imports Bridge's private recipe helpers.
"""

from pathlib import Path
from typing import Any, Literal

from megatron.bridge.data.builders import ChatSFTPreprocessingConfig, GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedSequenceSpecs
from megatron.bridge.recipes.common import _peft_common, _pretrain_common, _sft_common
from megatron.bridge.training.config import ConfigContainer

from falcon_bridge.training.documents import separate_documents
from falcon_bridge.training.sft_dataset import pad_multiple


PRETRAIN_CUDA_GRAPH: Literal["none", "full_iteration"] = "none"
"""``model.cuda_graph_impl`` of the GPU recipes that pretrain, where a model's iterations can be captured."""


def pretrain_base(name: str, model: Any, *, seq_length: int) -> ConfigContainer:
    """Bridge's pretraining defaults around a provider; mock data until ``dataset.blend`` is set.

    Documents of a row are kept apart.

    Args:
        name: names the output directory under ``nemo_experiments``.
        model: the provider, its layout set; its sequence length is set here.
        seq_length: tokens a row, of model and data.
    """
    cfg = _pretrain_common()
    cfg.model, model.seq_length, cfg.dataset.seq_length = model, seq_length, seq_length
    if model.pipeline_model_parallel_size == 1 and not model.fp8 and not model.bitnet_warmup_steps:
        model.cuda_graph_impl = PRETRAIN_CUDA_GRAPH
    # mock data needs a vocabulary only; real data comes with its tokenizer
    cfg.tokenizer.tokenizer_type = "NullTokenizer"
    cfg.tokenizer.vocab_size = model.vocab_size - 1
    cfg.tokenizer.use_tokenizer_vocab_size = False
    if (model.context_parallel_size or 1) > 1:
        # heads are split, for otherwise each document would be cut into 2·CP equal parts
        model.cp_comm_type = "a2a"
    separate_documents(cfg)
    return _with_output(cfg, name)


def finetune_base(name: str, model: Any, *, seq_length: int, peft: Any | None = None) -> ConfigContainer:
    """Bridge's fine-tuning defaults around a provider: chat data in packed rows, loss on the answers.

    What to train on (``--dataset``, `training.dataset.use_sft_dataset`) and from (``--hf-path``, or
    ``checkpoint.pretrained_checkpoint`` and ``tokenizer.tokenizer_model``) is for the user to say.

    Args:
        name: names the output directory under ``nemo_experiments``.
        model: the provider, its layout set; its sequence length is set here.
        seq_length: tokens a packed row, of model and data.
        peft: the adapters to train; all weights where None.
    """
    cfg = _sft_common() if peft is None else _peft_common()
    cfg.model, cfg.peft, model.seq_length = model, peft, seq_length
    cfg.dataset = GPTSFTDatasetConfig(
        seq_length=seq_length,
        preprocessing=ChatSFTPreprocessingConfig(),
        enable_offline_packing=True,
        offline_packing_specs=PackedSequenceSpecs(
            packed_sequence_size=seq_length,
            pad_seq_to_mult=pad_multiple(
                model.tensor_model_parallel_size, model.context_parallel_size, model.sequence_parallel
            ),
        ),
        dataset_kwargs={"pad_to_max_length": True},
        do_test=False,
        dataloader_type="batch",
        num_workers=2,
        data_sharding=True,
        pin_memory=True,
        persistent_workers=False,
    )
    cfg.train.micro_batch_size = 1  # a packed row
    # rows differ in how many tokens have a loss: each token counts the same, not each row
    model.calculate_per_token_loss = True
    cfg.ddp.use_distributed_optimizer = cfg.optimizer.use_distributed_optimizer = True
    cfg.ddp.overlap_grad_reduce = cfg.ddp.overlap_param_gather = True
    cfg.ddp.average_in_collective = False
    return _with_output(cfg, name)


def set_layout(model: Any, *, tp: int = 1, pp: int = 1, cp: int = 1) -> None:
    """Set the parallel sizes of a provider; sequence parallelism comes with tensor parallelism."""
    model.tensor_model_parallel_size, model.sequence_parallel = tp, tp > 1
    model.pipeline_model_parallel_size = pp
    model.context_parallel_size = cp


def set_batch(cfg: ConfigContainer, *, global_batch_size: int, micro_batch_size: int) -> None:
    """Rows a step, and rows at a time on a rank."""
    cfg.train.global_batch_size, cfg.train.micro_batch_size = global_batch_size, micro_batch_size


def set_adamw(cfg: ConfigContainer, *, weight_decay: float) -> None:
    """AdamW (0.9, 0.95, eps 1e-16), gradients clipped at 1: TII's Megatron script and post-training documentation.

    Megatron exempts parameters of one dimension from the weight decay, and with them A_log, D and dt_bias.
    """
    optimizer, scheduler = cfg.optimizer, cfg.scheduler
    optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps, optimizer.clip_grad = 0.9, 0.95, 1e-16, 1.0
    optimizer.weight_decay = weight_decay
    # the scheduler writes its own weight decay over the optimizer's at every step
    scheduler.start_weight_decay = scheduler.end_weight_decay = weight_decay


def on_cpu(cfg: ConfigContainer) -> ConfigContainer:
    """Make a recipe one for `compat.cpu_runtime`: fp32, gloo, nothing that needs a GPU or hides a step.

    Args:
        cfg: changed in place.

    Returns:
        `cfg`.
    """
    cfg.mixed_precision = None
    cfg.model.cuda_graph_impl = "none"
    cfg.optimizer.bf16 = False
    cfg.dist.distributed_backend = "gloo"
    cfg.dist.disable_jit_fuser = True
    cfg.ddp.use_distributed_optimizer = cfg.optimizer.use_distributed_optimizer = False
    cfg.ddp.overlap_grad_reduce = cfg.ddp.overlap_param_gather = False
    cfg.ddp.average_in_collective = False
    cfg.dataset.num_workers = 0
    cfg.checkpoint.fully_parallel_save = False
    cfg.checkpoint.async_strategy = "mcore"
    cfg.train.manual_gc = False
    cfg.logger.tensorboard_dir = None
    cfg.logger.log_timers_to_tensorboard = False
    cfg.logger.log_interval = 1
    return cfg


def _with_output(cfg: ConfigContainer, name: str) -> ConfigContainer:
    output = Path.cwd() / "nemo_experiments" / name
    cfg.checkpoint.save = cfg.checkpoint.load = str(output / "checkpoints")
    # a checkpoint of a distributed optimizer loads under any layout, not only another data-parallel size
    cfg.checkpoint.dist_ckpt_optim_fully_reshardable = True
    cfg.logger.tensorboard_dir = str(output / "tb_logs")
    return cfg
