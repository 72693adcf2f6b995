"""Bad input: one readable line that says what to do, the right exit status, nothing left behind."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from falcon_bridge.conversion.checksums import write_checksums


def _config(hf, **changes):
    path = hf / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            del config[name]
        else:
            config[name] = value
    path.write_text(json.dumps(config))


def _weights(hf, change):
    path = hf / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _bytes(hf, change):
    path = hf / "model.safetensors"
    data = bytearray(path.read_bytes())
    data = change(data) or data
    path.write_bytes(data)


def _header_length(data):
    return struct.unpack("<Q", data[:8])[0]


def _flip_in_header(data):
    data[8 + _header_length(data) // 2] ^= 0x10


def _flip_exponent(data):
    # the first tensor's second float: 2^127 is far from any weight
    start = 8 + _header_length(data) + 4
    data[start + 3] ^= 0x40


def _huge_header(data):
    data[6] = 0x7F


def _set_nan(tensors):
    tensors["model.layers.1.mamba.A_log"][3] = float("nan")


def _reshape(tensors):
    tensors["model.layers.0.mamba.D"] = tensors["model.layers.0.mamba.D"][:-1].clone()


DAMAGES = {
    "not a checkpoint": (lambda hf: [path.unlink() for path in hf.iterdir()], ["no config.json"]),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), ["no safetensors files"]),
    "pickle only": (
        lambda hf: (hf / "model.safetensors").rename(hf / "pytorch_model.bin"),
        ["pytorch_model.bin", "not safe"],
    ),
    "truncated": (lambda hf: _bytes(hf, lambda data: data[: len(data) // 2]), ["truncated", "bytes of"]),
    "one byte short": (lambda hf: _bytes(hf, lambda data: data[:-1]), ["truncated"]),
    "trailing bytes": (lambda hf: _bytes(hf, lambda data: data + b"\0" * 8), ["damaged"]),
    "empty file": (lambda hf: _bytes(hf, lambda data: b"\0"), ["truncated or damaged"]),
    "flipped header bit": (lambda hf: _bytes(hf, _flip_in_header), ["model.safetensors"]),
    "huge header": (lambda hf: _bytes(hf, _huge_header), ["truncated or damaged"]),
    "flipped exponent bit": (lambda hf: _bytes(hf, _flip_exponent), ["magnitude", "--allow-nonfinite"]),
    "git lfs pointer": (
        lambda hf: _bytes(hf, lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ["git lfs pull"],
    ),
    "NaN": (lambda hf: _weights(hf, _set_nan), ["model.layers.1.mamba.A_log", "NaN"]),
    "tensor missing": (
        lambda hf: _weights(hf, lambda tensors: tensors.pop("model.final_layernorm.weight")),
        ["lacks model.final_layernorm.weight"],
    ),
    "tensor unknown": (
        lambda hf: _weights(hf, lambda tensors: tensors.update({"model.extra": torch.ones(3)})),
        ["model.extra"],
    ),
    "tensor misshapen": (lambda hf: _weights(hf, _reshape), ["model.layers.0.mamba.D", "[7]", "[8]"]),
    "float64": (
        lambda hf: _weights(hf, lambda tensors: tensors.update({k: v.double() for k, v in tensors.items()})),
        ["F64", "float32 or bfloat16"],
    ),
    "other architecture": (
        lambda hf: _config(hf, architectures=["MistralForCausalLM"], model_type="mistral"),
        ["MistralForCausalLM", "FalconH1ForCausalLM"],
    ),
    "Llama that is not ternary": (
        lambda hf: _config(hf, architectures=["LlamaForCausalLM"], model_type="llama"),
        ["LlamaForCausalLM without BitNet's marks", '"is_bitnet_config": true'],
    ),
    "no architecture": (lambda hf: _config(hf, architectures=...), ["architectures"]),
    "invalid JSON": (lambda hf: (hf / "config.json").write_text("{"), ["not valid JSON"]),
    "JSON list": (lambda hf: (hf / "config.json").write_text("[]"), ["JSON object"]),
    "missing field": (lambda hf: _config(hf, mamba_d_state=...), ['lacks "mamba_d_state"']),
    "missing multiplier": (lambda hf: _config(hf, key_multiplier=...), ['lacks "key_multiplier"']),
    "misspelt field": (
        lambda hf: _config(hf, hidden_size=..., hiden_size=48),
        ['lacks "hidden_size"', "misspelt", "hiden_size"],
    ),
    "string for a number": (lambda hf: _config(hf, num_hidden_layers="2"), ['"num_hidden_layers"', "an integer"]),
    "boolean for a number": (lambda hf: _config(hf, hidden_size=True), ['"hidden_size"', "an integer"]),
    "negative": (lambda hf: _config(hf, mamba_n_heads=-8), ['"mamba_n_heads"', "positive"]),
    "list too short": (lambda hf: _config(hf, ssm_multipliers=[1, 1]), ['"ssm_multipliers"', "list of 5 numbers"]),
    "NaN in the config": (lambda hf: _config(hf, key_multiplier=float("nan")), ['"key_multiplier"', "finite", "nan"]),
    "infinite in a list": (
        lambda hf: _config(hf, mlp_multipliers=[1.0, float("inf")]),
        ['"mlp_multipliers"', "2 finite numbers"],
    ),
    "an integer beyond floats": (lambda hf: _config(hf, lm_head_multiplier=10**400), ['"lm_head_multiplier"', "bits"]),
    "infinite rope": (lambda hf: _config(hf, rope_parameters={"rope_theta": float("inf")}), ['"rope_theta"']),
    "no epsilon": (lambda hf: _config(hf, rms_norm_eps=0.0), ['"rms_norm_eps" must be positive']),
    "dropout of all": (lambda hf: _config(hf, attention_dropout=1.0), ['"attention_dropout"', "below 1"]),
    "absurd positions": (lambda hf: _config(hf, max_position_embeddings=10**12), ['"max_position_embeddings"']),
    "fractional positions": (lambda hf: _config(hf, max_position_embeddings=5.5), ['"max_position_embeddings"']),
    "absurd width": (lambda hf: _config(hf, hidden_size=10**30), ['"hidden_size"', "no model has"]),
    "wider than the files": (
        lambda hf: _config(hf, hidden_size=2**31 - 1),
        ["model.embed_tokens.weight", str(2**31 - 1)],
    ),
    "deeper than the files": (
        lambda hf: _config(hf, num_hidden_layers=10**9),
        ["the files have 2 layers", "num_hidden_layers 1000000000"],
    ),
    "quantised": (
        lambda hf: _config(hf, quantization_config={"quant_method": "fp8"}),
        ["quantised checkpoints are not supported, dequantise it first"],
    ),
    "fp8 weights": (
        lambda hf: _weights(
            hf,
            lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)}),
        ),
        ["lm_head.weight", "F8_E4M3", "dequantise"],
    ),
    "a directory for the weights": (
        lambda hf: ((hf / "model.safetensors").unlink(), (hf / "model.safetensors").mkdir()),
        ["model.safetensors", "directory"],
    ),
    "weights in a link loop": (
        lambda hf: ((hf / "model.safetensors").unlink(), (hf / "model.safetensors").symlink_to("model.safetensors")),
        ["model.safetensors", "symbolic links"],
    ),
    "damaged tokenizer": (lambda hf: (hf / "tokenizer.json").write_text('{"model": 3}'), ["the tokenizer in"]),
    "no rope": (lambda hf: _config(hf, rope_parameters=...), ["rope_theta"]),
    "unsupported value": (lambda hf: _config(hf, mamba_conv_bias=False), []),
    "config of other weights": (lambda hf: _config(hf, intermediate_size=96), ["96"]),
    "empty index": (lambda hf: (hf / "model.safetensors.index.json").write_text("{}"), ["not a safetensors index"]),
    "index names a missing file": (
        lambda hf: (hf / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}})
        ),
        ["model-00002-of-00002.safetensors"],
    ),
    "index leaves the directory": (
        lambda hf: (hf / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}})
        ),
        ["../model.safetensors"],
    ),
    "index leaves tensors out": (
        lambda hf: (hf / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}})
        ),
        ["not in model.safetensors.index.json"],
    ),
    "changed after its checksums": (
        lambda hf: (write_checksums(hf), _weights(hf, lambda tensors: tensors["lm_head.weight"].neg_())),
        ["SHA-256"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_source_is_refused(run, hf, tmp_path, name):
    damage, texts = DAMAGES[name]
    damage(hf)
    before = sorted(tmp_path.rglob("*"))
    result = run("convert", "import", hf, tmp_path / "made" / "megatron", "--json")
    assert result.exit_code in (1, 2)
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and len(line) < 500 and "Traceback" not in line
    for text in texts:
        assert text in line, line
    assert json.loads(result.stdout)["ok"] is False
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--tp", "3"], "does not divide the model's 4 attention heads: it can be 1, 2, 4"),
        (["--pp", "4"], "2 layers do not split evenly over --pp 4 stages: choose a divisor of 2"),
        (["--cp", "2"], "--cp above 1 needs GPUs"),
        (["--sequence-parallel"], "give --tp 2 or more"),
    ],
)
def test_an_impossible_layout_is_refused(run, hf, tmp_path, args, text):
    if "--cp" in args and torch.cuda.is_available():
        pytest.skip("CP works on GPUs")
    result = run("convert", "import", hf, tmp_path / "megatron", *args)
    assert result.exit_code == 2 and text in result.stderr and not (tmp_path / "megatron").exists()
    assert "--first-stage-layers" not in result.stderr


def test_sources_that_are_no_directory(run, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for source, text in (("", "name is empty"), (tmp_path / "loop", "leads nowhere")):
        result = run("convert", "import", source, tmp_path / "megatron")
        assert result.exit_code == 2 and text in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("verb", ["import", "export"])
def test_an_existing_output_is_left_alone(run, hf, tmp_path, verb):
    target = tmp_path / "there"
    target.mkdir()
    (target / "precious").write_text("x")
    result = run("convert", verb, hf, target)
    assert result.exit_code == 2 and "--force" in result.stderr
    assert [path.name for path in target.iterdir()] == ["precious"]


def test_export_of_what_is_no_megatron_checkpoint(run, hf, tmp_path):
    result = run("convert", "export", hf, tmp_path / "out")
    assert result.exit_code == 2 and "use `convert import`" in result.stderr and not (tmp_path / "out").exists()


def test_an_export_format_that_there_is_not(run, tmp_path):
    result = run("convert", "export", tmp_path, tmp_path / "out", "--format", "hff")
    assert result.exit_code == 2 and "--format hff is unknown: use one of hf, bitnet" in result.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["falcon_h1_tiny_cpu_pretrian_config"], "did you mean 'falcon_h1_tiny_cpu_pretrain_config'?"),
        (["falcon_h1_7b_pretrain"], "did you mean 'falcon_h1_7b_pretrain_config'?"),
        (["llama"], "`falcon-bridge recipes` lists them"),
        (["TINY", "train.train_itres=3"], "did you mean 'train.train_iters'?"),
        (["TINY", "trian.train_iters=3"], "did you mean 'train'?"),
        (["TINY", "model.hidden_size.x=3"], "unknown override key 'model.hidden_size.x'"),
        (["TINY", "train.train_iters"], "write key.sub=value"),
        (["TINY", "train.train_iters=many"], "train.train_iters must be an integer, not 'many'"),
        (["TINY", "train.train_iters=2.5"], "train.train_iters must be an integer"),
        (["TINY", "optimizer.lr=fast"], "optimizer.lr must be a number"),
        (["TINY", "model.gated_norm=3"], "model.gated_norm must be true or false"),
        (["TINY", "train.train_iters=[1"], "cannot be applied"),
        (["TINY", "model.layer_pattern=PPXP"], "X"),
        (["TINY", "model.layer_pattern=PPP"], "4"),
        (["TINY", "model.tensor_model_parallel_size=3"], "must divide num_attention_heads=4"),
        (["TINY", "--dataset", "/nowhere/corpus"], "/nowhere/corpus.bin does not exist"),
        (["TINY", "--hf-path", "/nowhere/hf"], "/nowhere/hf does not exist"),
        (["TINY", "train.micro_batch_size=3"], "global_batch_size=8 must be a multiple of train.micro_batch_size=3"),
        (["TINY", "--nproc", "3", "model.tensor_model_parallel_size=2"], "3 ranks cannot hold TP·PP·CP = 2"),
    ],
)
def test_a_training_that_cannot_be(run, tmp_path, monkeypatch, args, text):
    monkeypatch.chdir(tmp_path)
    recipe = args[0].replace("TINY", "falcon_h1_tiny_cpu_pretrain_config")
    result = run("train", "--recipe", recipe, *args[1:])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert text in line, line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would train")
def test_a_gpu_recipe_without_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", "--recipe", "falcon_h1_500m_pretrain_config")
    assert result.exit_code == 2 and "is for GPUs" in result.stderr and list(tmp_path.iterdir()) == []
