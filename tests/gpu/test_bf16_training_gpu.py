"""Five AdamW steps in bf16: how far Megatron and transformers each end from an fp32 run of transformers.

Two bf16 runs round independently and cannot agree with each other, so both are measured against the fp32 run, and ours
must not be further from it. Distances are relative to how far the fp32 run moved: the weights' from its weights over
the length of its path, the losses' over its fall.
"""

import copy
import gc
import math

import pytest
import torch

from falcon_bridge.verification.batch import Batch, random_batch
from falcon_bridge.verification.layout import ParallelLayout
from tests.gpu.rank import checkpoint


pytestmark = pytest.mark.gpu

STEPS, LR, BETAS, EPS, DECAY, CLIP = 5, 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 64,
    "mamba_n_heads": 16,
    "mamba_d_ssm": 1024,
    "vocab_size": 2051,
}


def transformers_steps(path, batch: Batch, dtype: torch.dtype, device: str, *, fp32_optimizer: bool):
    """Losses before each step, and the weights after the last, fp32 on CPU.

    `fp32_optimizer` keeps fp32 copies of the parameters and steps those, as Megatron does; otherwise torch's AdamW
    works on the bf16 parameters themselves.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).train()
    parameters = list(model.parameters())
    stepped = [copy.deepcopy(p.detach()).float() for p in parameters] if fp32_optimizer else parameters
    groups = [
        {"params": [p for p in stepped if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in stepped if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    tokens, losses = batch.tokens.to(device), []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        losses.append(loss.item())
        loss.backward()
        for parameter, main in zip(parameters, stepped, strict=True):
            main.grad = parameter.grad.to(main.dtype)
        torch.nn.utils.clip_grad_norm_(stepped, CLIP)
        optimizer.step()
        with torch.no_grad():
            for parameter, main in zip(parameters, stepped, strict=True):
                if main is not parameter:
                    parameter.copy_(main)
                parameter.grad = None
    names = [name for name, _ in model.named_parameters()]
    return losses, {name: p.detach().float().cpu() for name, p in zip(names, stepped, strict=True)}


def megatron_steps(path, batch: Batch, dtype: str):
    """The same of ours; in bf16 the weights are the optimizer's fp32 ones."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from falcon_bridge.verification.megatron import MegatronUnderTest

    model = MegatronUnderTest(path, ParallelLayout(), dtype)
    config = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        weight_decay=DECAY,
        clip_grad=CLIP,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
    )
    optimizer = get_megatron_optimizer(config, model.chunks)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(model.loss(batch, backward=True))
        optimizer.step()
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            main = getattr(parameter, "main_param", None)
            if main is not None:
                parameter.data = main.data
    weights = {name: tensor.float().cpu() for name, tensor in model.export()}
    model.close()
    return losses, weights


def all_runs(path, batch: Batch, device: str):
    from falcon_bridge.verification.megatron import DTYPES

    runs = {}
    for name, dtype, fp32_optimizer in (
        ("truth", "fp32", False),
        ("transformers", "bf16", False),
        ("transformers, fp32 main weights", "bf16", True),
    ):
        runs[name] = transformers_steps(path, batch, DTYPES[dtype], device, fp32_optimizer=fp32_optimizer)
        gc.collect()
    runs["ours, fp32"] = megatron_steps(path, batch, "fp32")
    runs["ours"] = megatron_steps(path, batch, "bf16")
    return runs


def distances(run, truth, start: dict[str, torch.Tensor]) -> dict[str, float]:
    (losses, weights), (true_losses, true_weights) = run, truth

    def norm(minuend, subtrahend):
        return math.sqrt(sum((minuend[name] - subtrahend[name]).double().square().sum().item() for name in start))

    return {
        "weight_distance": norm(weights, true_weights) / norm(true_weights, start),
        "loss_distance": max(abs(a - b) for a, b in zip(losses, true_losses, strict=True))
        / (true_losses[0] - min(true_losses)),
    }


def test_ours_stays_as_close_to_fp32_as_transformers(tmp_path, fp32_rank, report):
    from transformers import AutoConfig, AutoModelForCausalLM

    path = checkpoint(tmp_path, "gated_norm", **SHAPE)
    batch = random_batch(AutoConfig.from_pretrained(path), batch_size=4, seq_length=512, seed=8)
    runs = fp32_rank(all_runs, path, batch, "cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    truth = runs.pop("truth")
    report(test="five AdamW steps", run="transformers fp32", losses=truth[0])
    results = {}
    for name, run in runs.items():
        assert run[1].keys() == start.keys()
        results[name] = distances(run, truth, start)
        report(test="five AdamW steps", run=name, losses=run[0], **results[name])
    assert truth[0][-1] < truth[0][0] - 0.1  # it learns
    # what is left of two fp32 runs is rounding, which Adam amplifies where the gradient is noise
    assert results["ours, fp32"]["weight_distance"] < results["ours"]["weight_distance"]
    ours, stock, same_optimizer = (
        results[name] for name in ("ours", "transformers", "transformers, fp32 main weights")
    )
    assert ours["weight_distance"] <= stock["weight_distance"]
    # the same roundings in another order; the losses of the stock run have one less, that of updated weights to bf16
    assert ours["weight_distance"] <= 1.2 * same_optimizer["weight_distance"]
    # five losses of one trajectory: 1.0 times on CPU, 1.9 times on an H100, where the weights end equally far off
    assert ours["loss_distance"] <= 2.5 * same_optimizer["loss_distance"]
