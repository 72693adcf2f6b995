"""FP8 with Transformer Engine's per-tensor current scaling: the layers' linears in FP8, the rest as in bf16."""

import gc

import pytest
import torch

from falcon_bridge import FalconH1ModelProvider
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.reference import TrainSteps
from tests.gpu.rank import checkpoint
from tests.parallel.variant import Variant


pytestmark = pytest.mark.gpu

FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
# in_proj's output: 2·1024 + 2·64 + 16 = 137·16
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
TRAIN = TrainSteps(steps=10, lr=1e-3, eps=1e-8)


def logits_gradients_losses(path, batch, fields):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from falcon_bridge.verification.megatron import MegatronUnderTest

    model = MegatronUnderTest(path, Variant(fields=fields), "bf16")
    logits = model.logits(batch)
    gradients = model.gradients(batch)[1]
    model.close()
    # in bf16, taking the gradients out costs a model the hooks that collect them
    model = MegatronUnderTest(path, Variant(fields=fields), "bf16")
    try:
        config = OptimizerConfig(optimizer="adam", lr=TRAIN.lr, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16)
        optimizer, losses = get_megatron_optimizer(config, model.chunks), []
        for _ in range(TRAIN.steps):
            optimizer.zero_grad()
            losses.append(model.loss(batch, backward=True))
            optimizer.step()
    finally:
        model.close()
        gc.collect()
    return logits, torch.cat([gradients[name].flatten() for name in sorted(gradients)]), losses


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


@pytest.mark.parametrize("name", ["gated_norm", "groups2"])
def test_fp8_trains_close_to_bf16(name, tmp_path, rank, report):
    from transformers import AutoConfig

    path = checkpoint(tmp_path, name, **SHAPE)
    batch = random_batch(AutoConfig.from_pretrained(path), batch_size=4, seq_length=256, seed=9)
    runs = {
        kind: rank(logits_gradients_losses, path, batch, fields)
        for kind, fields in {
            "bf16": {},
            "fp8": FP8,
            "fp8, recompute": {**FP8, "recompute_mixer": True},
            "fp8, full recompute": {
                **FP8,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        }.items()
    }
    expected = runs.pop("bf16")
    report(test="fp8", config=name, kind="bf16", losses=expected[2])
    for kind, (logits, gradients, losses) in runs.items():
        figures = {"logits": cosine(logits, expected[0]), "gradients": cosine(gradients, expected[1])}
        report(test="fp8", config=name, kind=kind, losses=losses, **figures)
        assert not torch.equal(logits, expected[0]), "FP8 was not used"
        # e4m3 has 3 bits of mantissa, the gradients' e5m2 has 2: 3 % and 6 % a product, averaged over the widths
        assert figures["logits"] > 0.98, kind
        assert figures["gradients"] > 0.9, kind
        assert losses[-1] < losses[0] - 0.3 * (expected[2][0] - expected[2][-1]), kind
        assert abs(losses[-1] - expected[2][-1]) < 0.1 * (expected[2][0] - expected[2][-1]) + 0.05, kind
    assert abs(runs["fp8"][2][0] - runs["fp8, recompute"][2][0]) < 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"mamba_num_heads": 24},  # as in 0.5B, 1.5B-Deep and 7B: 3352 wide
        {"mamba_num_heads": 16, "tensor_model_parallel_size": 2},
        {"mamba_num_heads": 16, "ffn_hidden_size": 1000},
    ],
)
def test_widths_that_fp8_cannot_take_are_refused_in_one_line(fields):
    shape = {
        "num_layers": 2,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 64,
        "ffn_hidden_size": 1024,
        "mamba_head_dim": 64,
        "mamba_state_dim": 128,
        "vocab_size": 2051,
        "params_dtype": torch.bfloat16,
        "bf16": True,
    }
    provider = FalconH1ModelProvider(**{**shape, **FP8, **fields})
    with pytest.raises(ValueError, match=r"multiples? of 16") as refusal:
        provider.finalize()
    assert "\n" not in str(refusal.value)
