"""A GPT of 60 thousand parameters and the config that trains it on a CPU."""

from typing import Any

import torch


def provider(num_layers: int = 2, **fields: Any):
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec

    return GPTModelProvider(
        num_layers=num_layers,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        seq_length=32,
        vocab_size=97,
        make_vocab_size_divisible_by=1,
        position_embedding_type="rope",
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        share_embeddings_and_output_weights=False,
        pipeline_dtype=torch.float32,
        transformer_layer_spec=local_layer_spec,
        transformer_impl="local",
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        **fields,
    )


def pretrain_config(iterations: int, save: str | None = None, **fields: Any):
    from megatron.bridge.training import config
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    return config.ConfigContainer(
        model=provider(**fields),
        train=config.TrainingConfig(train_iters=iterations, global_batch_size=4, micro_batch_size=2),
        validation=config.ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-3, weight_decay=0.01, clip_grad=1.0),
        scheduler=config.SchedulerConfig(
            lr_decay_style="constant",
            override_opt_param_scheduler=True,
            start_weight_decay=0.01,
            end_weight_decay=0.01,
            weight_decay_incr_style="constant",
        ),
        ddp=DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=True),
        dataset=config.MockGPTDatasetConfig(
            random_seed=1234,
            seq_length=32,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
            num_dataset_builder_threads=1,
        ),
        logger=config.LoggerConfig(log_interval=1, tensorboard_dir=None),
        tokenizer=config.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=96),
        checkpoint=config.CheckpointConfig(save=save, load=save, save_interval=1000, ckpt_format="torch_dist"),
        rng=config.RNGConfig(seed=1234),
        dist=config.DistributedInitConfig(distributed_backend="gloo"),
    )
