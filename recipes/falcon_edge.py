"""Recipes of the Falcon-Edge sizes for 80 GB GPUs, and small ones for two CPU cores."""

from megatron.bridge.training.config import ConfigContainer

from falcon_bridge.models.falcon_edge import sizes
from falcon_bridge.models.falcon_edge.provider import FalconEdgeModelProvider
from falcon_bridge.recipes._common import on_cpu
from falcon_bridge.recipes._falcon_edge import falcon_edge_pretrain, falcon_edge_sft
from falcon_bridge.recipes.schedule import warmup_stable_decay


def falcon_edge_1b_pretrain_config() -> ConfigContainer:
    """Falcon-Edge-1B from scratch with WSD: one GPU and up. Learning rate of the FAQ's 1.3B."""
    return falcon_edge_pretrain("falcon_edge_1b", sizes.FalconEdgeModelProvider1B(), lr=1.2e-3, micro_batch_size=2)


def falcon_edge_1b_two_stage_pretrain_config() -> ConfigContainer:
    """Falcon-Edge-1B from scratch in the FAQ's two stages, with those of its 1.3B: one GPU and up."""
    model = sizes.FalconEdgeModelProvider1B()
    return falcon_edge_pretrain("falcon_edge_1b_two_stage", model, lr=1.2e-3, second_stage_lr=8e-4, micro_batch_size=2)


def falcon_edge_1b_sft_config() -> ConfigContainer:
    """Falcon-Edge-1B fine-tuned on packed chats: one GPU and up."""
    return falcon_edge_sft("falcon_edge_1b_sft", sizes.FalconEdgeModelProvider1B())


def falcon_edge_3b_pretrain_config() -> ConfigContainer:
    """Falcon-Edge-3B from scratch with WSD: eight GPUs and up, data parallel. Learning rate of the FAQ's 3B."""
    return falcon_edge_pretrain("falcon_edge_3b", sizes.FalconEdgeModelProvider3B(), lr=1.2e-3, micro_batch_size=2)


def falcon_edge_3b_two_stage_pretrain_config() -> ConfigContainer:
    """Falcon-Edge-3B from scratch in the FAQ's two stages, with those of its 3B: eight GPUs and up, data parallel."""
    model = sizes.FalconEdgeModelProvider3B()
    return falcon_edge_pretrain(
        "falcon_edge_3b_two_stage", model, lr=1.2e-3, second_stage_lr=6.4e-4, micro_batch_size=2
    )


def falcon_edge_3b_sft_config() -> ConfigContainer:
    """Falcon-Edge-3B fine-tuned on packed chats: eight GPUs and up, data parallel."""
    return falcon_edge_sft("falcon_edge_3b_sft", sizes.FalconEdgeModelProvider3B())


def falcon_edge_tiny_cpu_pretrain_config() -> ConfigContainer:
    """A small Falcon-Edge on CPU, fp32 over gloo: about a minute on two cores."""
    cfg = falcon_edge_pretrain(
        "falcon_edge_tiny_cpu",
        _tiny(),
        lr=4e-3,
        seq_length=128,
        global_batch_size=8,
        micro_batch_size=8,
        train_iters=200,
    )
    cfg.scheduler.lr_warmup_iters = 10
    return _small(cfg)


def falcon_edge_tiny_cpu_sft_config() -> ConfigContainer:
    """A small Falcon-Edge fine-tuned on packed chats on CPU, fp32 over gloo."""
    cfg = falcon_edge_sft("falcon_edge_tiny_cpu_sft", _tiny(), seq_length=256, global_batch_size=4)
    warmup_stable_decay(cfg, 2e-3, warmup=5, stable=45, decay=50)
    return _small(cfg)


def _small(cfg: ConfigContainer) -> ConfigContainer:
    cfg.validation.eval_interval, cfg.validation.eval_iters = 100, 2
    cfg.checkpoint.save_interval = 100
    if hasattr(cfg.dataset, "split"):
        cfg.dataset.split = "90,5,5"
    return on_cpu(cfg)


def _tiny() -> FalconEdgeModelProvider:
    return FalconEdgeModelProvider(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        vocab_size=1021,
        make_vocab_size_divisible_by=1,
        init_method_std=0.06,
    )
