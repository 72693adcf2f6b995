"""Fine-tuning as users run it: the tiny recipes on packed chats, resumed, exported, and asked in transformers.

A step takes every row, so the loss that Megatron reports for a packed step is that of all conversations, one by one,
in transformers: of the weights that the step starts from.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from falcon_bridge.conversion.adapter_export import export_adapter
from falcon_bridge.conversion.adapter_merge import export_merged
from falcon_bridge.conversion.adapters import find_adapters, is_adapter_checkpoint
from falcon_bridge.conversion.exporter import export_checkpoint
from falcon_bridge.conversion.importer import import_checkpoint
from falcon_bridge.errors import UserError
from falcon_bridge.verification.layout import ParallelLayout


def test_packed_fine_tuning_has_the_loss_of_each_conversation_alone(chats, tmp_path):
    losses = chats.run("falcon_h1_tiny_cpu_sft_config", tmp_path / "sft", 6)
    assert losses[0] == pytest.approx(chats.loss(AutoModelForCausalLM.from_pretrained(chats.hf)), rel=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert not is_adapter_checkpoint(tmp_path / "sft")
    with pytest.raises(UserError, match="has a whole model, no adapters"):
        find_adapters(tmp_path / "sft")
    export_checkpoint(tmp_path / "sft", tmp_path / "hf", ParallelLayout())
    more = chats.run("falcon_h1_tiny_cpu_sft_config", tmp_path / "sft", 7)
    assert more == [pytest.approx(chats.loss(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), rel=1e-5)]


@pytest.mark.parametrize("scheme", ["lora", "dora"])
def test_adapters_are_trained_resumed_exported_and_merged(scheme, chats, tmp_path):
    from peft import PeftModel

    out, recipe = tmp_path / scheme, "falcon_h1_tiny_cpu_peft_config"
    overrides, made = [], []
    if scheme == "dora":  # on top of a Megatron checkpoint; LoRA starts from the Hugging Face one
        import_checkpoint(chats.hf, tmp_path / "megatron", ParallelLayout())
        made = ["megatron"]
        overrides = [f"checkpoint.pretrained_checkpoint={tmp_path / 'megatron'}"]
    untrained = AutoModelForCausalLM.from_pretrained(chats.hf)
    losses = chats.run(recipe, out, 3, *overrides, peft_scheme=scheme)
    assert losses[0] == pytest.approx(chats.loss(untrained), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1
    assert is_adapter_checkpoint(out)

    export_adapter(out, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = ["down_proj", "gate_proj", "in_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(config["target_modules"]) == names and config["modules_to_save"] == ["out_proj"]
    assert config["use_dora"] == (scheme == "dora")
    adapted = PeftModel.from_pretrained(untrained, tmp_path / "adapter")

    # the checkpoint is of the weights after step 3, from which the resumed run takes its first step
    resumed = chats.run(recipe, out, 5, *overrides, peft_scheme=scheme)
    assert len(resumed) == 2 and resumed[0] == pytest.approx(chats.loss(adapted), rel=1e-5)

    iteration = out / "iter_0000003"
    export_merged(iteration, tmp_path / "merged_hf", ParallelLayout(tp=2 if scheme == "dora" else 1))
    assert {path.name for path in tmp_path.iterdir()} == {scheme, "adapter", "merged_hf"} | {*made}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged_hf")
    ids = torch.randint(0, 131, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (adapted(ids).logits - merged(ids).logits).abs().max() <= 1e-4
    changed = load_file(tmp_path / "merged_hf" / "model.safetensors")
    kept = load_file(chats.hf / "model.safetensors")
    same = {name.split(".", 3)[-1] for name, value in kept.items() if torch.equal(changed[name], value)}
    assert {"mamba.A_log", "mamba.D", "mamba.dt_bias", "mamba.conv1d.weight", "input_layernorm.weight"} <= same
    assert not {name for name in same if name.endswith("_proj.weight")}
