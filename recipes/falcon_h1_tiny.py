"""Recipes for two CPU cores: the main job's pretraining, and fine-tuning at the same scale."""

from megatron.bridge.training.config import ConfigContainer

from falcon_bridge.models.falcon_h1.provider import FalconH1ModelProvider
from falcon_bridge.recipes._common import on_cpu
from falcon_bridge.recipes._falcon_h1 import falcon_h1_peft, falcon_h1_pretrain, falcon_h1_sft
from falcon_bridge.recipes.schedule import warmup_stable_decay


def falcon_h1_tiny_cpu_pretrain_config() -> ConfigContainer:
    """A small Falcon-H1 on CPU, fp32 over gloo: about a minute on two cores."""
    cfg = falcon_h1_pretrain(
        "falcon_h1_tiny_cpu", _model(), seq_length=128, global_batch_size=8, micro_batch_size=8, train_iters=200
    )
    cfg.scheduler.lr_warmup_iters = 10
    # the released learning rate is for a larger model and batches of millions of tokens
    cfg.optimizer.lr, cfg.optimizer.min_lr = 4e-3, 5e-4
    cfg.optimizer.adam_eps = 1e-8
    cfg.validation.eval_interval, cfg.validation.eval_iters = 100, 2
    cfg.dataset.split = "90,5,5"
    cfg.checkpoint.save_interval = 100
    return on_cpu(cfg)


def falcon_h1_tiny_cpu_sft_config() -> ConfigContainer:
    """A small Falcon-H1 fine-tuned on packed chats on CPU, fp32 over gloo."""
    return _fine_tuned(falcon_h1_sft("falcon_h1_tiny_cpu_sft", _model(), seq_length=256, global_batch_size=4), 2e-3)


def falcon_h1_tiny_cpu_peft_config(peft_scheme: str = "lora") -> ConfigContainer:
    """A small Falcon-H1 with LoRA (or ``peft_scheme="dora"``) on packed chats on CPU, fp32 over gloo."""
    cfg = falcon_h1_peft("falcon_h1_tiny_cpu_peft", _model(), peft_scheme, seq_length=256, global_batch_size=4)
    cfg.peft.dim = 8
    cfg.peft.alpha = 16
    return _fine_tuned(cfg, 1e-2)


def _fine_tuned(cfg: ConfigContainer, lr: float) -> ConfigContainer:
    """The schedule of a run of 100 steps, which the released one would not fit into."""
    warmup_stable_decay(cfg, lr, warmup=5, stable=45, decay=50)
    cfg.optimizer.adam_eps = 1e-8
    cfg.validation.eval_interval, cfg.validation.eval_iters = 100, 2
    cfg.checkpoint.save_interval = 100
    return on_cpu(cfg)


def _model() -> FalconH1ModelProvider:
    return FalconH1ModelProvider(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=24,
        mamba_num_heads=8,
        mamba_head_dim=24,
        mamba_state_dim=32,
        mamba_num_groups=1,
        gated_norm=True,
        chunk_size=64,
        vocab_size=1021,
        make_vocab_size_divisible_by=1,
        init_method_std=0.06,
        # the released 0.5B's, and the head's by the width law: at this width the whole law, extrapolated tenfold below
        # its base, scales the keys by 40 and the attention saturates
        embedding_multiplier=5.656854249492381,
        lm_head_multiplier=40 / 128,
        key_multiplier=0.39062499999999994,
        attention_out_multiplier=0.9375,
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.23570226039551587,
        mlp_multipliers=(0.8838834764831844, 0.5859375),
        ssm_multipliers=(0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738),
    )
