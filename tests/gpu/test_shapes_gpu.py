"""The Transformer Engine and mamba-ssm path against transformers on the same GPU, at released shapes, random weights."""

import gc
import json
import os

import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM

import falcon_bridge


pytestmark = pytest.mark.gpu

SEQUENCE, BATCH = 1024, 2
PROVIDERS = {"0.5B": "FalconH1ModelProvider500M", "1.5B-Deep": "FalconH1ModelProvider1P5BDeep"}


def hf_config(size: str) -> FalconH1Config:
    from falcon_bridge.models.falcon_h1.hf_config import hf_config_fields

    provider = getattr(falcon_bridge, PROVIDERS[size])()
    return FalconH1Config(**{**hf_config_fields(provider), "dtype": "float32"})


def random_model(size: str) -> FalconH1ForCausalLM:
    torch.manual_seed(20)
    with torch.device("cuda"):
        model = FalconH1ForCausalLM(hf_config(size))
    for name, parameter in model.named_parameters():
        spread = 0.5 + torch.rand(()).item()
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3 if "conv1d" in name else 0.02 * spread)
        elif "norm" in name:
            parameter.data.normal_(1, 0.1)
        elif "A_log" in name:
            parameter.data.uniform_(0, 2.5)
        else:
            parameter.data.normal_(0, 0.3 * spread)
    return model


@pytest.fixture(scope="module", params=PROVIDERS)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = random_model(request.param)
    model.save_pretrained(path)
    ids = torch.randint(1, model.config.vocab_size, (BATCH, SEQUENCE), device="cuda")
    return request.param, path, ids


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def transformers_run(path, ids, dtype):
    """Logits, loss and gradients of transformers in train mode, where it uses the fused kernels."""
    model = FalconH1ForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").cuda().train()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {name: parameter.grad.float().cpu() for name, parameter in model.named_parameters()}
    return out.logits.detach().float().cpu(), out.loss.item(), gradients


def megatron_run(path, ids, dtype, **fields):
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(path)
    provider = bridge.to_megatron_provider()
    provider.params_dtype, provider.bf16 = dtype, dtype == torch.bfloat16
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    positions = torch.arange(SEQUENCE, device="cuda")[None].expand(BATCH, -1)
    vocab = provider.vocab_size
    with torch.no_grad():
        logits = model[0](ids, positions, None)[..., :vocab].float().cpu()
    loss = model[0](ids, positions, None, labels=ids.roll(-1, 1))[:, :-1].float().mean()
    loss.backward()
    for parameter in model[0].parameters():
        parameter.data = parameter.grad
    gradients = {
        name: tensor.float() for name, tensor in bridge.export_hf_weights(model, cpu=True, show_progress=False)
    }
    return logits, loss.item(), gradients


def compare(ours, theirs) -> dict[str, float]:
    (logits, loss, gradients), (hf_logits, hf_loss, hf_gradients) = ours, theirs
    assert gradients.keys() == hf_gradients.keys()
    flat, hf_flat = logits.double().flatten(), hf_logits.double().flatten()
    return {
        "max_rel_logit_diff": ((logits - hf_logits).abs().max() / hf_logits.abs().max()).item(),
        "cosine": torch.nn.functional.cosine_similarity(flat, hf_flat, dim=0).item(),
        "agreement": (logits.argmax(-1) == hf_logits.argmax(-1)).double().mean().item(),
        "loss": loss,
        "loss_diff": abs(loss - hf_loss),
        "max_rel_grad_diff": max(
            ((gradients[name] - grad).norm() / grad.norm()).item() for name, grad in hf_gradients.items()
        ),
    }


def report(size: str, case: str, result: dict[str, float]) -> None:
    line = json.dumps({"size": size, "case": case, **result})
    print(line)
    if "OUT" in os.environ:
        with open(os.path.join(os.environ["OUT"], "parity.jsonl"), "a") as log:
            log.write(line + "\n")


def test_against_transformers(checkpoint):
    size, path, ids = checkpoint
    cases = {}
    for case, run, dtype, fields in (
        ("hf fp32", transformers_run, torch.float32, {}),
        ("te fp32", megatron_run, torch.float32, {"transformer_impl": "transformer_engine"}),
        ("hf bf16", transformers_run, torch.bfloat16, {}),
        ("te bf16", megatron_run, torch.bfloat16, {"transformer_impl": "transformer_engine"}),
    ):
        cases[case] = run(path, ids, dtype, **fields)
        gc.collect()
        torch.cuda.empty_cache()
    pairs = {
        f"{a} vs {b}": compare(cases[a], cases[b])
        for a, b in (("te fp32", "hf fp32"), ("te bf16", "hf bf16"), ("te bf16", "hf fp32"), ("hf bf16", "hf fp32"))
    }
    for name, result in pairs.items():
        report(size, name, result)
    fp32, bf16 = pairs["te fp32 vs hf fp32"], pairs["te bf16 vs hf bf16"]
    assert fp32["cosine"] > 0.999999
    assert bf16["cosine"] >= 0.9999
