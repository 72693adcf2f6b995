"""The one builder behind the Falcon-H1 pretraining recipes."""

import math
from pathlib import Path

from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.training.config import ConfigContainer

from falcon_bridge.models.falcon_h1.provider import FalconH1ModelProvider


# arXiv 2507.22448: the warm-up takes about 0.1 GT; TII's Megatron script has the rest
_WARMUP_TOKENS = 100_000_000
_LR = 128e-5
_WEIGHT_DECAY = 0.1


def falcon_h1_pretrain(
    name: str,
    model: FalconH1ModelProvider,
    *,
    seq_length: int = 4096,
    global_batch_size: int = 512,
    micro_batch_size: int = 1,
    train_iters: int = 100_000,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
) -> ConfigContainer:
    """Pretraining of a Falcon-H1 with TII's settings, which µP makes the same for every width.

    AdamW (0.9, 0.95, eps 1e-16), weight decay 0.1, gradient clipping at 1, learning rate 128e-5 warmed up over 0.1 GT
    and then WSD with an exponential decay over the last tenth. Data is mock data until ``dataset.blend`` is set.

    Args:
        name: names the output directory under ``nemo_experiments``.
        model: the provider; its layout and sequence length are set here.
        seq_length: tokens a row.
        global_batch_size: rows a step.
        micro_batch_size: rows at a time on a rank.
        train_iters: steps.
        tp: tensor-parallel size; sequence parallelism comes with it.
        pp: pipeline-parallel size.
        cp: context-parallel size.

    Returns:
        The configuration.
    """
    cfg = _pretrain_common()
    cfg.model = model
    model.seq_length = seq_length
    model.tensor_model_parallel_size = tp
    model.sequence_parallel = tp > 1
    model.pipeline_model_parallel_size = pp
    model.context_parallel_size = cp

    cfg.dataset.seq_length = seq_length
    # mock data needs a vocabulary only; real data comes with its tokenizer
    cfg.tokenizer.tokenizer_type = "NullTokenizer"
    cfg.tokenizer.vocab_size = model.vocab_size - 1
    cfg.tokenizer.use_tokenizer_vocab_size = False

    cfg.train.train_iters = train_iters
    cfg.train.global_batch_size = global_batch_size
    cfg.train.micro_batch_size = micro_batch_size

    cfg.optimizer.lr = _LR
    cfg.optimizer.min_lr = _LR / 8
    cfg.optimizer.adam_beta1, cfg.optimizer.adam_beta2, cfg.optimizer.adam_eps = 0.9, 0.95, 1e-16
    cfg.optimizer.clip_grad = 1.0
    cfg.optimizer.weight_decay = _WEIGHT_DECAY
    # the scheduler writes its own weight decay over the optimizer's at every step
    cfg.scheduler.start_weight_decay = cfg.scheduler.end_weight_decay = _WEIGHT_DECAY
    cfg.scheduler.lr_decay_style = "WSD"
    cfg.scheduler.lr_wsd_decay_style = "exponential"
    cfg.scheduler.lr_warmup_iters = min(
        math.ceil(_WARMUP_TOKENS / (global_batch_size * seq_length)), train_iters // 10
    )
    cfg.scheduler.lr_decay_iters = train_iters
    cfg.scheduler.lr_wsd_decay_iters = train_iters // 10

    output = Path.cwd() / "nemo_experiments" / name
    cfg.checkpoint.save = cfg.checkpoint.load = str(output / "checkpoints")
    cfg.logger.tensorboard_dir = str(output / "tb_logs")
    return cfg


def on_cpu(cfg: ConfigContainer) -> ConfigContainer:
    """Make a recipe one for `compat.cpu_runtime`: fp32, gloo, nothing that needs a GPU or hides a step.

    Args:
        cfg: changed in place.

    Returns:
        `cfg`.
    """
    cfg.mixed_precision = None
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
