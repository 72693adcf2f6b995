"""Parameters of a Falcon-H1 and the memory of its training state, from its shapes."""

from dataclasses import dataclass
from typing import Any

from falcon_bridge.models.falcon_h1.pattern import ATTENTION, MAMBA, MLP, PARALLEL


def count_parameters(config: Any) -> int:
    """Parameters of a `FalconH1ModelProvider`, without vocabulary padding; equal to what a build has.

    Args:
        config: the provider.
    """
    hidden, pattern = config.hidden_size, config.resolve_layer_pattern()
    layers = sum(_layer_parameters(config, symbol) for symbol in pattern)
    embeddings = config.vocab_size * hidden * (1 if config.share_embeddings_and_output_weights else 2)
    return layers + embeddings + hidden


def _layer_parameters(config: Any, symbol: str) -> int:
    parts = {
        PARALLEL: (_attention(config) + _mamba(config), _mlp(config)),
        MAMBA: (_mamba(config),),
        ATTENTION: (_attention(config),),
        MLP: (_mlp(config),),
    }[symbol]
    return sum(part + config.hidden_size for part in parts)  # each part has a norm before it


def _attention(config: Any) -> int:
    if not config.num_attention_heads:
        return 0
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    groups = config.num_query_groups or config.num_attention_heads
    return config.hidden_size * head_dim * 2 * (config.num_attention_heads + groups)


def _mamba(config: Any) -> int:
    if not config.mamba_num_heads:
        return 0
    width, heads = config.d_ssm, config.mamba_num_heads
    conv_channels = width + 2 * config.mamba_num_groups * config.mamba_state_dim
    in_proj = config.hidden_size * (width + conv_channels + heads)
    conv = conv_channels * (config.conv_kernel + 1)
    norm = width if config.gated_norm else 0
    return in_proj + conv + 3 * heads + norm + width * config.hidden_size


def _mlp(config: Any) -> int:
    return 3 * config.hidden_size * config.ffn_hidden_size


@dataclass(frozen=True)
class StateMemory:
    """Bytes of training state on one rank (an even split over TP and PP).

    Attributes:
        weights: parameters in the model's dtype.
        gradients: fp32 accumulation buffers.
        optimizer: fp32 main weights (where the model's are not fp32) and Adam's two moments.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def state_memory(cfg: Any, world_size: int) -> StateMemory:
    """Weights, gradients and optimizer state of a rank; activations are not in it.

    Args:
        cfg: a ``ConfigContainer`` with a Falcon-H1 provider.
        world_size: number of ranks.
    """
    model = cfg.model
    model_parallel = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    parameters = count_parameters(model) / model_parallel
    half = cfg.mixed_precision is not None or model.bf16
    shards = max(1, world_size // model_parallel) if cfg.ddp.use_distributed_optimizer else 1
    return StateMemory(
        weights=int(parameters * (2 if half else 4)),
        gradients=int(parameters * 4),
        optimizer=int(parameters * (12 if half else 8) / shards),
    )
