"""BitNet checkpoints through files: every format, exact from any layout, loaded by stock transformers."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from falcon_bridge.bitnet.reference import quantize_activation
from falcon_bridge.conversion.bitnet_config import LATENT_ENTRY, PACKED_ENTRY
from falcon_bridge.conversion.compare import compare_checkpoints
from falcon_bridge.conversion.export_format import ExportFormat
from falcon_bridge.conversion.exporter import export_checkpoint
from falcon_bridge.conversion.hf_checkpoint import check_checkpoint
from falcon_bridge.conversion.importer import import_checkpoint
from falcon_bridge.conversion.megatron_checkpoint import HF_SOURCE_NAME, find_megatron_checkpoint
from falcon_bridge.conversion.roundtrip import round_trip
from falcon_bridge.errors import JobError, UserError
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import Batch
from falcon_bridge.verification.checkpoints import write_random_checkpoint
from falcon_bridge.verification.edge_checkpoints import write_random_edge_checkpoint
from falcon_bridge.verification.layout import ParallelLayout
from falcon_bridge.verification.verify import VerifyRequest, verify
from tests.unit.models.falcon_edge.oracle import BitNetLlama, tokens_off_ties


NAME, SEED = "gqa4", 3
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Compiling transformers' BitNet functions takes longer than all tests here, and changes no result."""
    with torch.compiler.set_stance("force_eager"):
        yield


def write(path, form="prequantized", **kwargs):
    return write_random_edge_checkpoint(path, NAME, form, seed=SEED, **kwargs)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def megatron(hf, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "megatron"
    import_checkpoint(hf, target, ParallelLayout(tp=2))
    return target


@pytest.fixture(scope="module")
def oracle(hf):
    tokens = tokens_off_ties(hf, rows=1, length=8)
    with torch.no_grad():
        return tokens, BitNetLlama.load(hf, torch.float32).logits(tokens)


def config_of(path):
    return json.loads((path / "config.json").read_text())


def set_field(megatron, name, value):
    path = find_megatron_checkpoint(megatron).iteration_dir / "run_config.yaml"
    text = path.read_text()
    old = f"  {name}: {json.dumps(not value)}\n"
    assert text.count(old) == 1
    path.write_text(text.replace(old, f"  {name}: {json.dumps(value)}\n"))


@pytest.mark.parametrize(
    ("format", "layout"),
    [("bitnet", ParallelLayout(tp=2, sequence_parallel=True)), ("prequantized", ParallelLayout(pp=2))],
)
def test_an_export_computes_the_training_models_logits_in_stock_transformers(
    hf, megatron, oracle, tmp_path, format, layout
):
    found = export_checkpoint(megatron, tmp_path / "out", layout, format=format)
    assert found.form == format
    expected = write(tmp_path / "expected", format)
    assert not compare_checkpoints(expected, tmp_path / "out").mismatched
    assert config_of(tmp_path / "out")["quantization_config"] == {"bitnet": PACKED_ENTRY}.get(format, LATENT_ENTRY)
    assert config_of(tmp_path / "out")["is_bitnet_config"] is True
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    tokens, logits = oracle
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(tokens).logits - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_bf16_is_a_dense_model_of_ternary_weights(megatron, tmp_path):
    export_checkpoint(megatron, tmp_path / "out", ParallelLayout(), format="bf16")
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16" and config["is_bitnet_config"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    expected = load_file(write(tmp_path / "expected", "bf16") / "model.safetensors")
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear and model.dtype == torch.bfloat16


def test_an_imported_checkpoint_is_verified_as_closely_as_the_conversion(hf, megatron, tmp_path):
    """In fp32 activations flip: a model that is loaded must be as wide as one that is converted."""
    request = VerifyRequest(hf, megatron=megatron, seq_length=64)
    found = verify(request)
    assert found.ok and found.max_abs_logit_diff <= 1e-6 * found.max_abs_logit, found
    dense = shutil.copytree(megatron, tmp_path / "dense")
    set_field(dense, "use_bitnet", False)
    with pytest.raises(UserError, match=r"has use_bitnet=False, but .* has BitNet's marks"):
        verify(replace(request, megatron=dense))


def test_without_a_source_hf_is_latent_weights(hf, megatron, tmp_path):
    scratch = shutil.copytree(megatron, tmp_path / "scratch")
    shutil.rmtree(scratch / HF_SOURCE_NAME)
    assert export_checkpoint(scratch, tmp_path / "out", ParallelLayout()).form == "prequantized"
    assert not compare_checkpoints(hf, tmp_path / "out").mismatched
    assert config_of(tmp_path / "out")["quantization_config"] == LATENT_ENTRY


@pytest.mark.parametrize(
    ("form", "dtype", "layout"),
    [
        ("bitnet", torch.float32, ParallelLayout()),
        ("bitnet", torch.bfloat16, ParallelLayout(tp=2)),
        ("bf16", torch.bfloat16, ParallelLayout()),
        ("prequantized", torch.bfloat16, ParallelLayout(pp=2)),
    ],
)
def test_round_trips_keep_form_codes_and_scales(tmp_path, form, dtype, layout):
    source = write(tmp_path / "hf", form, dtype=dtype)
    if dtype == torch.bfloat16 and form == "bitnet":  # as Falcon-E stores its scales
        tensors = load_file(source / "model.safetensors")
        rounded = {name: t.bfloat16() if name.endswith("weight_scale") else t for name, t in tensors.items()}
        save_file(rounded, source / "model.safetensors", metadata={"format": "pt"})
    found, _ = round_trip(source, layout, work_dir=tmp_path)
    assert found.ok and found.params_compared == len(load_file(source / "model.safetensors")), found


def test_packed_codes_through_megatron_and_back_to_latents_keep_codes_and_scales(tmp_path):
    """packed → Megatron → latent → Megatron → packed."""
    source = write(tmp_path / "packed", "bitnet")
    import_checkpoint(source, tmp_path / "first", ParallelLayout())
    export_checkpoint(tmp_path / "first", tmp_path / "latent", ParallelLayout(), format="prequantized")
    import_checkpoint(tmp_path / "latent", tmp_path / "second", ParallelLayout())
    export_checkpoint(tmp_path / "second", tmp_path / "again", ParallelLayout(), format="bitnet")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_dense_twin_is_exported_as_a_plain_llama_only(megatron, tmp_path):
    dense = shutil.copytree(megatron, tmp_path / "dense")
    set_field(dense, "use_bitnet", False)
    with pytest.raises(UserError, match="has is_bitnet_config true, but the model was trained with null"):
        export_checkpoint(dense, tmp_path / "out", ParallelLayout())
    shutil.rmtree(dense / HF_SOURCE_NAME)
    with pytest.raises(UserError, match=r"--format bitnet is for ternary models, .* use_bitnet=False: use hf"):
        export_checkpoint(dense, tmp_path / "out", ParallelLayout(), format="bitnet")
    assert not (tmp_path / "out").exists()


def test_weights_that_have_no_codes_are_not_exported(tmp_path):
    source = write(tmp_path / "hf", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    tensors[Q][1, 2] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(source, tmp_path / "megatron", ParallelLayout(), allow_nonfinite=True)
    with pytest.raises(JobError, match=f"{Q}: has NaN or infinite weights") as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", ParallelLayout(), format="bitnet")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_formats_are_checked_before_the_work(megatron, tmp_path):
    with pytest.raises(UserError, match="--format gguf is unknown: use one of hf, bitnet, prequantized, bf16"):
        export_checkpoint(megatron, tmp_path / "out", ParallelLayout(), format="gguf")
    packed = ExportFormat("bitnet", "LlamaForCausalLM", ternary=True, dtype="F32")
    with pytest.raises(UserError, match=f"{Q} has 18 out features, .* multiple of 4, .* use --format prequantized or"):
        packed.shapes({Q: (18, 8)})
    assert packed.shapes({Q: (16, 8), "model.norm.weight": (8,)}) == {
        Q: (4, 8),
        Q + "_scale": (1,),
        "model.norm.weight": (8,),
    }


def test_trained_weights_keep_their_digits():
    """`hf` restores the dtypes of the source only where that changes neither codes nor scales."""
    names = {Q: "BF16", Q + "_scale": "BF16", "model.norm.weight": "BF16"}
    latent = ExportFormat("hf", "LlamaForCausalLM", True, "F32", "prequantized", names)
    packed = ExportFormat("hf", "LlamaForCausalLM", True, "F32", "bitnet", names)
    W = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    tensors = {Q: W, "model.norm.weight": W[0]}
    assert dict(latent.convert(tensors.items()))[Q].dtype == torch.float32
    assert dict(latent.convert([(Q, W.bfloat16().float())]))[Q].dtype == torch.bfloat16
    assert dict(latent.convert(tensors.items()))["model.norm.weight"].dtype == torch.bfloat16
    assert dict(packed.convert(tensors.items()))[Q + "_scale"].dtype == torch.float32


def _edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[Q].bitwise_or_(0b1100), f"{Q}: byte 0x.* holds the code 3"),
        (lambda t: t.pop(Q + "_scale"), f"lacks {Q}_scale, without which the packed weight has no magnitude"),
        (lambda t: t[Q + "_scale"].zero_(), f"{Q}_scale: must be positive and finite, got 0.0"),
        (
            lambda t: t.update({Q: t[Q][:-1].clone()}),
            rf"{Q} has shape \[15, 48\], but config.json asks for \[16, 48\]",
        ),
        (lambda t: t.update({Q + "_scale": torch.ones(2)}), rf"{Q}_scale has shape \[2\], .* asks for \[1\]"),
        (lambda t: t.update({Q: t[Q].float()}), f"{Q} is F32 among packed .U8. weights"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.uint8)}), "lm_head.weight as U8"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight has NaN values"),
    ],
)
def test_damaged_packed_files_are_named_before_the_work(tmp_path, change, message):
    source = write(tmp_path / "hf", "bitnet", tokenizer=False)
    _edit(source, change)
    with pytest.raises(UserError, match=message) as caught:
        check_checkpoint(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": None}, "no quantization_config, so the scale could be mean"),
        (
            {"quantization_config": PACKED_ENTRY | {"linear_class": "ternary"}},
            "linear_class is 'ternary', so the scale",
        ),
        ({"quantization_config": LATENT_ENTRY}, "quantization_mode is 'online'"),
        ({"quantization_config": "bitnet"}, '"quantization_config" must be an object'),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
        (
            {"quantization_config": None, "is_bitnet_config": False},
            'without BitNet\'s marks: .*"is_bitnet_config": true',
        ),
        ({"rms_norm_eps": None}, '"rms_norm_eps" must be a number'),
        ({"rms_nrom_eps": 1e-5, "rms_norm_eps": ...}, 'lacks "rms_norm_eps".*is it misspelt as'),
    ],
)
def test_configs_that_leave_packed_weights_ambiguous_are_refused(tmp_path, fields, message):
    source = write(tmp_path / "hf", "bitnet", tokenizer=False)
    config = {**config_of(source), **fields}
    (source / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    with pytest.raises(UserError, match=message) as caught:
        check_checkpoint(source)
    assert "\n" not in str(caught.value)


def _margin(model, tokens):
    """How near an activation of a ternary layer comes to the middle between two codes."""
    margins = []

    def look(module, args):
        scaled = args[0].float() * quantize_activation(args[0])[1]
        margins.append((scaled - scaled.floor() - 0.5).abs().min().item())

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if type(m).__name__ == "BitLinear"]
    logits = model(tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert handles
    return min(margins), logits


def _megatron_logits(hf, iteration, tokens):
    from falcon_bridge.compat import cpu_runtime
    from falcon_bridge.verification.megatron import MegatronUnderTest

    with cpu_runtime():
        model = MegatronUnderTest(hf, ParallelLayout(), checkpoint=iteration)
        return model.logits(Batch(tokens))


def test_a_ternary_falcon_h1_is_packed_for_stock_transformers(tmp_path):
    source = write_random_checkpoint(tmp_path / "hf", "groups2_gated_norm", seed=2, num_hidden_layers=2)
    import_checkpoint(source, tmp_path / "megatron", ParallelLayout())
    set_field(tmp_path / "megatron", "use_bitnet", True)
    assert export_checkpoint(tmp_path / "megatron", tmp_path / "same", ParallelLayout()).form == "prequantized"
    assert compare_checkpoints(source, tmp_path / "same").ok
    found = export_checkpoint(tmp_path / "megatron", tmp_path / "out", ParallelLayout(tp=2), format="bitnet")
    assert found.form == "bitnet"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(model.model.layers[0].mamba.in_proj).__name__ == "BitLinear"
    for seed in range(200):
        tokens = torch.randint(1, 100, (1, 4), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            margin, logits = _margin(model, tokens)
        if margin > 2e-4:
            break
    iteration = find_megatron_checkpoint(tmp_path / "megatron").iteration_dir
    trained = run_ranks(_megatron_logits, 1, source, iteration, tokens, device="cpu")[0]
    assert margin > 2e-4 and (trained - logits).abs().max() <= 2e-5 * logits.abs().max()
    with pytest.raises(UserError, match=r'has a "quantization_config".* --format hf'):
        import_checkpoint(tmp_path / "out", tmp_path / "back", ParallelLayout())
