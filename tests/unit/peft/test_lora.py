"""Which layers get adapters, what is trained, and what the pieces of fused layers are."""

from types import SimpleNamespace

import pytest
import torch

import falcon_bridge
from falcon_bridge.conversion.adapter_export import _shortest
from falcon_bridge.peft import DoRA, LoRA, merge_adapters
from falcon_bridge.peft.lora import TARGETS, LoRALinear
from tests.unit.models.falcon_h1.conftest import one_rank, process_groups  # noqa: F401


SHAPE = {
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 10,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "mamba_state_dim": 12,
    "mamba_num_groups": 2,
    "vocab_size": 67,
    "seq_length": 16,
}


def build(peft, **fields):
    provider = falcon_bridge.FalconH1ModelProvider(**{**SHAPE, **fields})
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    return peft(model)


def adapted(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def logits(model):
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids, torch.arange(16).expand(2, -1), None)


@pytest.mark.parametrize("pattern", [None, "PM*", "--P"])
def test_every_linear_layer_of_every_kind_of_layer(one_rank, pattern):  # noqa: F811
    model = build(LoRA(dim=4), layer_pattern=pattern)
    linear = {
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS and not name.endswith(".to_wrap")
    }
    assert adapted(model) == linear and len(linear) >= 6
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.adapter.linear_{end}.weight" for name in linear for end in ("in", "out")}


def test_wildcards_choose_layers(one_rank):  # noqa: F811
    peft = LoRA(target_modules=["*.layers.1.*.in_proj", "linear_fc2", "*layers.2.*.linear_qkv"], dim=4)
    model = build(peft)
    layers = "decoder.layers"
    expected = {f"{layers}.{number}.mlp.linear_fc2" for number in range(3)}
    expected |= {f"{layers}.1.self_attention.mamba_mixer.in_proj", f"{layers}.2.self_attention.attention.linear_qkv"}
    assert adapted(model) == expected
    # the FLOP count and the memory estimate ask by name
    assert all(peft.adapts(name) for name in expected) and not peft.adapts(
        f"{layers}.0.self_attention.attention.linear_qkv"
    )


@pytest.mark.parametrize("scheme", [LoRA, DoRA])
def test_new_adapters_change_nothing_and_merging_keeps_what_they_learned(one_rank, scheme):  # noqa: F811
    model = build(scheme(dim=4, alpha=12))
    with scheme().disable_adapter(model):
        before = logits(model)
    assert torch.equal(logits(model), before) or (logits(model) - before).abs().max() <= 1e-6
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                # a length stays positive
                parameter.add_(noise * (0.2 * parameter if name.endswith("magnitude") else 0.1))
    learned = logits(model)
    assert (learned - before).abs().max() > 0.01
    merge_adapters(model)
    assert not adapted(model) and not any("adapter" in name for name, _ in model.named_parameters())
    assert (logits(model) - learned).abs().max() <= 1e-5


def test_magnitudes_stay_in_fp32(one_rank):  # noqa: F811
    provider = falcon_bridge.FalconH1ModelProvider(**SHAPE, bf16=True, params_dtype=torch.bfloat16)
    provider.finalize()
    provider.register_pre_wrap_hook(DoRA(dim=4))
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    dtypes = {name.rpartition(".adapter.")[2]: p.dtype for name, p in model.named_parameters() if ".adapter." in name}
    assert dtypes == {
        "linear_in.weight": torch.bfloat16,
        "linear_out.weight": torch.bfloat16,
        "weight_magnitude": torch.float32,
    }


def test_a_bitnet_model_has_no_adapters(one_rank):  # noqa: F811
    with pytest.raises(ValueError, match="adapters on a BitNet model are not supported"):
        build(LoRA(dim=4), use_bitnet=True)
    with pytest.raises(ValueError, match="recompute_modules has 'layernorm'"):
        LoRA(dim=4).check(SimpleNamespace(recompute_granularity="selective", recompute_modules=["layernorm"]))


def test_modules_are_named_by_their_last_name_where_all_layers_have_them():
    paths = [f"model.layers.{number}.mamba.in_proj" for number in range(3)] + ["model.layers.1.self_attn.q_proj"]
    assert _shortest(paths, 3) == ["in_proj", "model.layers.1.self_attn.q_proj"]
    assert _shortest([], 3) == []
