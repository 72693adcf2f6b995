"""Which Llamas are ours, what is loaded from each form, and what AutoBridge saves."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

import falcon_bridge  # noqa: F401  before megatron.bridge
from falcon_bridge.bitnet import codes as codes_module
from falcon_bridge.bitnet.reference import quantize_weight
from falcon_bridge.conversion.bitnet_config import LATENT_ENTRY, PACKED_ENTRY, is_bitnet, is_ternary_weight
from falcon_bridge.models.falcon_edge import bridge as bridge_module
from falcon_bridge.models.falcon_edge.bridge import FalconEdgeBridge
from falcon_bridge.models.falcon_edge.hf_config import check_hf_config, hf_config_fields, matrix_shape, tensor_names
from falcon_bridge.models.falcon_edge.provider import FalconEdgeModelProvider
from falcon_bridge.verification.edge_checkpoints import CONFIGS, random_edge_config, write_random_edge_checkpoint


FORMS = ("prequantized", "bitnet", "bf16")
K = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def auto():
    from megatron.bridge import AutoBridge

    return AutoBridge


@pytest.fixture(scope="module", params=FORMS)
def checkpoint(request, tmp_path_factory):
    return write_random_edge_checkpoint(tmp_path_factory.mktemp(request.param) / "hf", "gqa4", request.param, seed=2)


@pytest.fixture
def packed(tmp_path):
    return write_random_edge_checkpoint(tmp_path / "packed", "plain", "bitnet", tokenizer=False)


def change(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def build(bridge, dtype=torch.float32):
    provider = bridge.to_megatron_provider()
    provider.apply_overrides_and_finalize(dtype=dtype, overrides={"transformer_impl": "local"})
    return provider.provide_distributed_model(wrap_with_ddp=False, data_parallel_random_init=False)


def latents(auto, path, model):
    return dict(auto.from_hf_config(AutoConfig.from_pretrained(path)).export_hf_weights(model, show_progress=False))


@pytest.mark.parametrize(
    ("marks", "ours"),
    [
        ({"is_bitnet_config": True}, True),
        ({"quantization_config": PACKED_ENTRY}, True),
        ({"quantization_config": LATENT_ENTRY, "is_bitnet_config": True}, True),
        ({}, False),
        ({"is_bitnet_config": False}, False),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, False),
    ],
)
def test_only_bitnet_llamas_are_ours(auto, tmp_path, marks, ours):
    fields = random_edge_config("plain").to_dict()
    del fields["is_bitnet_config"]
    fields |= marks
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for bridge in (auto.from_hf_pretrained(tmp_path), auto.from_hf_config(AutoConfig.from_pretrained(tmp_path))):
        kind = type(bridge._model_bridge)
        assert (kind is FalconEdgeBridge) == ours
        assert ours or kind.__module__ == "megatron.bridge.models.llama.llama_bridge"
        provider = bridge.to_megatron_provider(load_weights=False)
        assert isinstance(provider, FalconEdgeModelProvider) == ours
        assert not ours or provider.use_bitnet


def test_subclasses_and_exports_of_other_llamas_stay_upstreams(auto):
    from megatron.bridge.models.conversion import model_bridge
    from megatron.core.models.gpt import GPTModel
    from transformers import LlamaForCausalLM

    class Finetuned(LlamaForCausalLM):
        pass

    config = LlamaConfig()
    assert type(model_bridge.get_model_bridge(Finetuned, hf_config=config)).__name__ == "LlamaBridge"
    assert type(model_bridge.get_model_bridge(LlamaForCausalLM)).__name__ == "LlamaBridge"
    streamed = model_bridge.stream_weights_megatron_to_hf._exact_types[LlamaForCausalLM, GPTModel]
    assert FalconEdgeBridge not in [cell.cell_contents for cell in streamed.__closure__]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_round_trip(auto, name):
    config = random_edge_config(name, max_position_embeddings=4096, bos_token_id=3)
    provider = auto.from_hf_config(config).to_megatron_provider(load_weights=False)
    provider.finalize()
    assert provider.seq_length != 4096 and provider.max_position_embeddings == 4096
    fields = FalconEdgeBridge.megatron_to_hf_config(provider)
    back = LlamaConfig(**fields)
    before, after = config.to_dict(), back.to_dict()
    assert after.pop("quantization_config") == LATENT_ENTRY and is_bitnet(back)
    differing = {key for key in before if before[key] != after.get(key)}
    assert differing <= {"transformers_version", "_name_or_path"}
    provider.use_bitnet = False
    assert not is_bitnet(hf_config_fields(provider))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "relu2"}, "hidden_act='relu2'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
        ({"quantization_config": PACKED_ENTRY | {"use_rms_norm": True}}, "use_rms_norm"),
        ({"quantization_config": PACKED_ENTRY | {"modules_to_not_convert": ["o_proj"]}}, r"must be \[\"lm_head\"\]"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    ],
)
def test_configs_of_other_models_are_refused(fields, message):
    config = LlamaConfig(**{**random_edge_config("plain").to_dict(), **fields})
    with pytest.raises(ValueError, match=message) as error:
        check_hf_config(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name):
    from transformers import LlamaForCausalLM

    config = random_edge_config(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert set(tensor_names(config)) == shapes.keys()
    ternary = [key for key in shapes if is_ternary_weight(key)]
    assert len(ternary) == 7 * config.num_hidden_layers
    assert all(matrix_shape(config, key) == shapes[key] for key in ternary)


def test_every_form_gives_the_same_codes_and_scales(one_rank, auto, checkpoint, tmp_path, monkeypatch):
    expected = load_file(write_random_edge_checkpoint(tmp_path, "gqa4", seed=2, tokenizer=False) / "model.safetensors")
    before, warnings = codes_module._generation, []
    # not caplog: training in this process has Megatron Bridge set the levels of all loggers
    monkeypatch.setattr(bridge_module.logger, "warning", lambda text, *args: warnings.append(text % args))
    found = latents(auto, checkpoint, build(auto.from_hf_pretrained(checkpoint)))
    assert codes_module._generation > before  # codes of whatever the parameters held before are not used any more
    lossy = [text for text in warnings if "latent weights that the model was trained with" in text]
    assert bool(lossy) == (checkpoint.parent.name[:6] != "prequa")
    assert found.keys() == expected.keys()
    rounded = "bf16" in str(checkpoint)  # codes times a factor of 8 bits
    for name, tensor in expected.items():
        if not is_ternary_weight(name):
            assert torch.equal(found[name], tensor), name
            continue
        (codes, scale), (right_codes, right_scale) = quantize_weight(found[name]), quantize_weight(tensor)
        assert torch.equal(codes, right_codes), name
        assert scale.item() == pytest.approx(right_scale.item(), rel=2**-8 if rounded else 1e-9), name


def test_autobridge_saves_the_form_that_it_loaded(one_rank, auto, checkpoint, tmp_path):
    bridge = auto.from_hf_pretrained(checkpoint)
    model = build(bridge)
    bridge.save_hf_pretrained(model, tmp_path / "saved", show_progress=False)
    before, after = (json.loads((path / "config.json").read_text()) for path in (checkpoint, tmp_path / "saved"))
    for mark in ("is_bitnet_config", "quantization_config"):
        assert before.get(mark) == after.get(mark), mark
    assert is_bitnet(bridge.hf_pretrained.config)
    first, second = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "saved"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.pop(K), f"lacks {K}"),
        (lambda t: t.pop(K + "_scale"), f"{K}_scale: missing"),
        (lambda t: t[K + "_scale"].fill_(-3), f"{K}_scale: must be positive and finite, got -3.0"),
        (lambda t: t[K].fill_(0b11), f"{K}: byte 0x03 .* holds the code 3"),
        (lambda t: t.update({K: t[K][:-1].clone()}), f"{K}: packed shape .* but the model's is"),
        (lambda t: t.update({K: t[K].float()}), f"{K}: packed ternary weights are uint8"),
    ],
)
def test_damaged_packed_checkpoints_are_named(one_rank, auto, packed, edit, message):
    change(packed, edit)
    with pytest.raises(ValueError, match=message) as error:
        build(auto.from_hf_pretrained(packed))
    assert "\n" not in str(error.value)


def test_nan_latents_are_named(one_rank, auto, tmp_path):
    path = write_random_edge_checkpoint(tmp_path / "latent", "plain", tokenizer=False)
    change(path, lambda tensors: tensors[K].view(-1)[7:8].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{K}: has NaN or infinite weights") as error:
        build(auto.from_hf_pretrained(path))
    assert "\n" not in str(error.value)


def test_streamed_weights_are_those_that_loading_gives(one_rank, auto, checkpoint):
    bridge = auto.from_hf_pretrained(checkpoint)
    chunks = build(bridge)
    loaded = dict(chunks[0].named_parameters())
    streamed = list(bridge._model_bridge.stream_weights_hf_to_megatron(bridge.hf_pretrained, chunks))
    assert {name for name, *_ in streamed} == loaded.keys()
    for name, weight, _ in streamed:
        assert torch.equal(weight, loaded[name]), name


def test_streaming_checks_as_loading_does(one_rank, auto, packed):
    chunks = build(auto.from_hf_pretrained(packed))
    for edit, message in [
        (lambda t: t[K].fill_(0b11), f"{K}: byte 0x03 .* holds the code 3"),
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
    ]:
        change(packed, edit)
        bridge = auto.from_hf_pretrained(packed)
        with pytest.raises(ValueError, match=message):
            list(bridge._model_bridge.stream_weights_hf_to_megatron(bridge.hf_pretrained, chunks))


def test_a_scale_without_its_convention_is_refused(one_rank, auto, packed):
    path = packed / "config.json"
    fields = json.loads(path.read_text())
    del fields["quantization_config"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="no quantization_config, so the scale could be mean"):
        build(auto.from_hf_pretrained(packed))
