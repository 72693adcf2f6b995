"""What would silently do nothing, or has not been shown to be right, is refused in one line."""

import pytest

from falcon_bridge.models.falcon_h1 import validation
from tests.unit.models.falcon_h1.tiny import tiny


SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def finalized(**fields):
    provider = tiny(**fields)
    provider.finalize()
    return provider


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {**SELECTIVE, "recompute_modules": ["moe"]},
            "has 'moe', of which this model has none: use some of 'core_attn'",
        ),
        ({**SELECTIVE, "recompute_modules": ["mlp", "shared_experts"]}, "has 'shared_experts'"),
        ({**SELECTIVE, "recompute_modules": ["mla_up_proj"]}, "has 'mla_up_proj'"),
        ({**SELECTIVE, "recompute_modules": ["mixer"]}, "recompute_mixer=True recomputes both branches"),
        ({**SELECTIVE, "layer_pattern": "M-M-"}, "has 'core_attn', of which this model has none"),
        ({**SELECTIVE, "recompute_modules": ["mlp"], "layer_pattern": "M*M*"}, "has 'mlp', of which"),
        ({**SELECTIVE, "num_attention_heads": 0}, "has 'core_attn', of which this model has none"),
        ({"recompute_modules": ["mlp"]}, "would do nothing: set recompute_granularity='selective'"),
        ({**FULL, "recompute_modules": ["mlp"]}, "would do nothing: set recompute_granularity='selective'"),
        ({"recompute_method": "uniform"}, "recompute_method would do nothing: set recompute_granularity='full'"),
        ({**SELECTIVE, "recompute_method": "block"}, "recompute_method would do nothing"),
        ({"distribute_saved_activations": True}, "distribute_saved_activations would do nothing"),
        ({**FULL, "recompute_mixer": True}, "set recompute_mixer=False"),
        ({"recompute_mixer": True, "layer_pattern": "----"}, "recompute_mixer=True would do nothing"),
        (
            {**FULL, "recompute_gates": True},
            "recompute_gates=True would save nothing with recompute_granularity='full'",
        ),
        (
            {**SELECTIVE, "recompute_modules": ["mlp"], "recompute_mixer": True, "recompute_gates": True},
            "recompute_gates=True would save nothing with recompute_mixer=True and 'mlp' in recompute_modules",
        ),
        (
            {"use_bitnet": True, "recompute_gates": True},
            "recompute_gates=True would save nothing with use_bitnet=True",
        ),
        ({"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}, "use 'native'"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl='local' is not supported; whole iterations can be captured"),
        ({"fp8": "hybrid", "bf16": True}, "fp8 needs Transformer Engine"),
        ({"enable_cuda_graph": True}, "see cuda_graph_impl"),
        ({"cpu_offloading": True}, "cpu_offloading=True is not supported"),
        ({"fine_grained_activation_offloading": True}, "fine_grained_activation_offloading=True is not supported"),
        ({"window_size": (128, 0)}, "sees the whole document"),
        ({"attention_output_gate": True}, "has no gate"),
        ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope=True is not supported"),
        ({"context_parallel_size": 3}, "must divide the 8 SSM heads of a tensor-parallel rank"),
        ({"context_parallel_size": 16, "mamba_num_heads": 24}, "must divide the 24 SSM heads"),
        ({"context_parallel_size": 2, "mamba_num_heads": 6, "mamba_num_groups": 3}, "its 3 groups"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError) as error:
        finalized(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_layernorm_recompute_needs_transformer_engine(monkeypatch):
    provider = tiny(**SELECTIVE, recompute_modules=["layernorm"])
    monkeypatch.setattr(validation, "HAVE_TE", True)
    validation.check_supported(provider)
    monkeypatch.setattr(validation, "HAVE_TE", False)
    with pytest.raises(ValueError, match="with Transformer Engine only"):
        validation.check_supported(provider)


@pytest.mark.parametrize(
    "fields",
    [
        FULL,
        {**FULL, "recompute_method": "block"},
        {**SELECTIVE, "recompute_modules": ["core_attn", "mlp"]},
        {**SELECTIVE, "recompute_modules": ["mlp"], "recompute_mixer": True},
        {"recompute_mixer": True},
        {"recompute_mixer": True, "layer_pattern": "M-M-"},
    ],
)
def test_accepted_also_twice(fields):
    provider = finalized(**fields)
    provider.finalize()
    assert provider.recompute_mixer is fields.get("recompute_mixer", False)
