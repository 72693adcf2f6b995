"""What a Falcon-H1 model cannot be or do, said in one line before anything is built."""

from megatron.core.tensor_parallel.random import HAVE_TE

from falcon_bridge.bitnet.validation import check_bitnet
from falcon_bridge.models.build import (
    check_architecture,
    check_cuda_graph,
    check_expressible,
    check_pipeline,
    recomputed_modules,
    refuse,
)
from falcon_bridge.models.falcon_h1.head_parallel import HEADS
from falcon_bridge.models.falcon_h1.pattern import ATTENTION, MAMBA, MLP, PARALLEL
from falcon_bridge.ops.ssd.backend import scan_backend


def check_supported(config) -> None:
    """Refuse configurations that would fail later or be ignored.

    Args:
        config: A `FalconH1ModelProvider`, not necessarily finalized.

    Raises:
        ValueError: With one line that names the field and says what to change.
    """
    pattern = config.resolve_layer_pattern()
    if config.num_attention_heads < 0 or config.mamba_num_heads < 0:
        raise ValueError("num_attention_heads and mamba_num_heads must not be negative")
    _check_heads(config, pattern)
    if config.mamba_num_heads:
        scan_backend(config.ssm_backend, config.mamba_head_dim, config.mamba_state_dim, device=None)
    _check_parallel_layout(config)
    _check_recompute(config, pattern)
    check_bitnet(config)
    _check_fp8(config, pattern)
    check_architecture(config, "Falcon-H1")
    refuse(
        {
            "use_mup": (config.use_mup, "Falcon-H1 has multipliers of its own (mup.falcon_h1_multipliers): unset it"),
            "fp16": (config.fp16, "fp16 overflows in the SSM: use bf16"),
            "attention_output_gate": (
                config.attention_output_gate,
                "Falcon-H1's attention has no gate: set it to False",
            ),
            "fused_single_qkv_rope": (
                config.fused_single_qkv_rope,
                "ops.qkv_rope does the same and scales the values: set it to False",
            ),
            "cpu_offloading": (
                config.cpu_offloading,
                "offloading has not been shown to be right for Falcon-H1's mixer: use recompute_granularity",
            ),
            "fine_grained_activation_offloading": (
                config.fine_grained_activation_offloading,
                "offloading has not been shown to be right for Falcon-H1's mixer: use recompute_granularity",
            ),
        }
    )
    check_expressible(config, "Falcon-H1")
    check_cuda_graph(config)
    for name, length in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
        if len(getattr(config, name)) != length:
            raise ValueError(f"{name} must hold {length} numbers, got {getattr(config, name)!r}")


def _check_heads(config, pattern: str) -> None:
    attention, mamba = config.num_attention_heads, config.mamba_num_heads
    if PARALLEL in pattern and attention == 0 and mamba == 0:
        raise ValueError("num_attention_heads and mamba_num_heads are both 0: a parallel block needs one of them")
    if ATTENTION in pattern and attention == 0:
        raise ValueError(f"layer_pattern has {ATTENTION!r} layers but num_attention_heads is 0")
    if MAMBA in pattern and mamba == 0:
        raise ValueError(f"layer_pattern has {MAMBA!r} layers but mamba_num_heads is 0")
    groups = config.num_query_groups
    if attention and groups and attention % groups:
        raise ValueError(f"num_attention_heads={attention} must be a multiple of num_query_groups={groups}")
    if mamba and mamba % config.mamba_num_groups:
        raise ValueError(f"mamba_num_heads={mamba} must be a multiple of mamba_num_groups={config.mamba_num_groups}")


def _check_recompute(config, pattern: str) -> None:
    granularity = config.recompute_granularity
    modules = recomputed_modules(config)
    if granularity != "full":
        for name in ("recompute_method", "recompute_num_layers", "distribute_saved_activations"):
            if getattr(config, name):
                raise ValueError(f"{name} would do nothing: set recompute_granularity='full', or unset {name}")
    if granularity != "selective" and set(config.recompute_modules or ()) - {"core_attn"}:  # Megatron's default
        raise ValueError(
            f"recompute_modules={config.recompute_modules} would do nothing: set recompute_granularity='selective', "
            "or unset recompute_modules"
        )
    if granularity == "full" and config.recompute_mixer:
        raise ValueError("recompute_granularity='full' recomputes the mixers, too: set recompute_mixer=False")
    if config.recompute_gates:
        for name, nothing in (
            ("recompute_granularity='full'", granularity == "full"),
            ("recompute_mixer=True and 'mlp' in recompute_modules", config.recompute_mixer and "mlp" in modules),
            ("use_bitnet=True, which keeps int8 codes of the gates' outputs", config.use_bitnet),
            ("fp8, which keeps the gates' outputs in fp8", config.fp8),
        ):
            if nothing:
                raise ValueError(f"recompute_gates=True would save nothing with {name}: set recompute_gates=False")
    attention = config.num_attention_heads > 0 and (PARALLEL in pattern or ATTENTION in pattern)
    present = {"core_attn": attention, "mlp": PARALLEL in pattern or MLP in pattern, "layernorm": True}
    for module in sorted(modules):
        if not present.get(module):
            known = ", ".join(repr(name) for name, there in present.items() if there)
            raise ValueError(
                f"recompute_modules has {module!r}, of which this model has none: use some of {known}; "
                "recompute_mixer=True recomputes both branches of the mixer"
            )
    if "layernorm" in modules and not HAVE_TE:
        raise ValueError(
            "recompute_modules has 'layernorm', which Megatron recomputes with Transformer Engine only: leave it out, "
            "or install falcon-bridge[gpu]"
        )
    if config.recompute_mixer and set(pattern) == {MLP}:
        raise ValueError("recompute_mixer=True would do nothing: this model has MLP layers only")


def _check_fp8(config, pattern: str) -> None:
    if not config.fp8:
        return
    if config.transformer_impl != "transformer_engine":
        raise ValueError(
            "fp8 needs Transformer Engine: set transformer_impl='transformer_engine' on a GPU, or fp8=None"
        )
    tp, hidden, ffn = config.tensor_model_parallel_size, config.hidden_size, config.ffn_hidden_size
    attention = config.num_attention_heads > 0 and (PARALLEL in pattern or ATTENTION in pattern)
    mamba = config.mamba_num_heads > 0 and (PARALLEL in pattern or MAMBA in pattern)
    head_dim = config.kv_channels or (hidden // config.num_attention_heads if attention else 0)
    key_value_heads = max(1, (config.num_query_groups or config.num_attention_heads) // tp)
    in_proj = 2 * config.d_ssm + 2 * config.mamba_num_groups * config.mamba_state_dim + config.mamba_num_heads
    # what a rank's linear layers contract over, forward or backward
    widths = {
        "hidden_size": hidden,
        "ffn_hidden_size / tp": ffn / tp if PARALLEL in pattern or MLP in pattern else 0,
        "query channels / tp": config.num_attention_heads * head_dim / tp if attention else 0,
        "query, key and value channels of a rank": (
            (config.num_attention_heads // tp + 2 * key_value_heads) * head_dim if attention else 0
        ),
        "d_ssm / tp": config.d_ssm / tp if mamba else 0,
        "in_proj's output (2·d_ssm + 2·groups·state + SSM heads) / tp": in_proj / tp if mamba else 0,
    }
    for name, width in widths.items():
        if width % 16:
            raise ValueError(
                f"fp8={config.fp8!r} needs widths that are multiples of 16, but {name} is {width:g}: set fp8=None, or "
                "change tensor_model_parallel_size or the width (for in_proj, mamba_num_heads a multiple of 16·tp)"
            )


def _check_parallel_layout(config) -> None:
    tp = config.tensor_model_parallel_size
    for name in ("num_attention_heads", "mamba_num_heads", "ffn_hidden_size"):
        value = getattr(config, name)
        if value and value % tp:
            raise ValueError(
                f"tensor_model_parallel_size={tp} must divide {name}={value}: use one of {_divisors(config)}"
            )
    groups, d_state = config.mamba_num_groups, config.mamba_state_dim
    if config.mamba_num_heads and groups % tp and (tp % groups or groups * d_state % tp):
        raise ValueError(
            f"tensor_model_parallel_size={tp} must divide mamba_num_groups={groups}, or be a multiple of it that "
            f"divides groups·state = {groups * d_state}"
        )
    _check_context_parallel(config)
    check_pipeline(config)


def _check_context_parallel(config) -> None:
    cp, heads = config.context_parallel_size, config.mamba_num_heads // config.tensor_model_parallel_size
    groups = max(1, config.mamba_num_groups // config.tensor_model_parallel_size)
    if heads and (heads % cp or (groups % cp and cp % groups)):
        raise ValueError(
            f"context_parallel_size={cp} must divide the {heads} SSM heads of a tensor-parallel rank, and divide its "
            f"{groups} groups or be a multiple of them: the SSM branch splits heads over the context-parallel ranks"
        )
    pattern = config.resolve_layer_pattern()
    attention = config.num_attention_heads > 0 and (PARALLEL in pattern or ATTENTION in pattern)
    if cp == 1 or not attention:
        return
    if config.cp_comm_type != HEADS and config.transformer_impl == "transformer_engine" and not config.bf16:
        raise ValueError(
            "Transformer Engine's attention has context parallelism in bf16 only: use bf16, cp_comm_type='a2a', which "
            "splits heads, or context_parallel_size=1"
        )


def _divisors(config) -> list[int]:
    widths = [w for w in (config.num_attention_heads, config.mamba_num_heads, config.ffn_hidden_size) if w]
    groups = [g for g in (config.num_query_groups if config.num_attention_heads else 0, config.mamba_num_groups) if g]
    return [
        tp
        for tp in range(1, max(widths) + 1)
        if all(width % tp == 0 for width in widths) and all(g % tp == 0 or tp % g == 0 for g in groups)
    ][:8]
