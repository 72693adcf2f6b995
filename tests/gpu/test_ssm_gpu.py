"""The fused SSM path (causal-conv1d, either scan) against the pure-torch one, same module and weights, on the GPU."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams


pytestmark = pytest.mark.gpu

LENGTHS = (300, 1, 127, 129, 5)  # one token, either side of a chunk's border, several chunks


def provider(dtype: torch.dtype, groups: int, gated_norm: bool, backend: str, heads: int = 4):
    from falcon_bridge import FalconH1ModelProvider

    config = FalconH1ModelProvider(
        num_layers=1,
        hidden_size=192,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=64,
        ffn_hidden_size=256,
        vocab_size=128,
        mamba_num_heads=heads,
        mamba_head_dim=64,
        mamba_state_dim=128,
        mamba_num_groups=groups,
        gated_norm=gated_norm,
        layernorm_epsilon=3e-4,
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.7,
        ssm_multipliers=(0.35, 0.25, 0.18, 0.5, 0.4),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        ssm_backend=backend,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
    )
    config.finalize()
    return config


def mixer(config):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from falcon_bridge.models.falcon_h1.layer_specs import falcon_h1_layer_spec

    submodules = falcon_h1_layer_spec(config).submodules.self_attention.submodules.mamba_mixer
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return submodules.module(config, submodules.submodules, layer_number=1, pg_collection=groups).cuda()


def randomize(module) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    for name, parameter in module.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator, device="cuda")
        centre, spread = {"A_log": (0.5, 0.5), "D": (1, 0.5), "dt_bias": (-1, 1), "norm.weight": (1, 0.3)}.get(
            name, (0, 0.4 if name.startswith("conv1d") else 0.08)
        )
        parameter.data.copy_(centre + spread * draw)


def packed(lengths) -> PackedSeqParams:
    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def linspace_like(y: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, y.numel(), device=y.device).view_as(y).to(y.dtype)


def run(module, backend: str, x: torch.Tensor, packed_seq_params=None):
    module.config.ssm_backend = backend
    module.zero_grad()
    x = x.detach().requires_grad_()
    y, _ = module(x, packed_seq_params)
    (y * linspace_like(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
@pytest.mark.parametrize("gated_norm", [True, False])
@pytest.mark.parametrize(("groups", "heads", "batch"), [(1, 4, 2), (2, 4, 2), (2, 8, 3), (1, 8, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
def test_fused_agrees_with_torch(dtype, tolerance, groups, heads, batch, gated_norm, backend, report):
    """fp32: Triton's dots run in tf32. bf16: the fused kernels round states and inputs to bf16.

    Rows of `in_proj` are a multiple of 8 wide with 8 heads only: causal-conv1d needs a copy with 4.
    """
    module = mixer(provider(dtype, groups, gated_norm, backend, heads))
    randomize(module)
    x = torch.randn(333, batch, 192, device="cuda", dtype=dtype)
    fused, plain = (run(module, which, x) for which in (backend, "torch"))
    errors = {name: ((fused[name] - plain[name]).norm() / plain[name].norm()).item() for name in plain}
    worst = max(errors, key=errors.get)
    about = {"backend": backend, "dtype": str(dtype), "groups": groups, "norm": gated_norm}
    report(test="ssm fused vs torch", **about, **{worst: errors[worst]})
    assert errors[worst] < tolerance, errors


@pytest.mark.parametrize("backend", ["torch", "mamba_ssm", "triton"])
def test_packed_documents_get_what_they_get_alone(backend, report):
    """Values and gradients. TF32 in Triton's dots here; test_parity_gpu.py has it off."""
    module = mixer(provider(torch.float32, 2, True, backend))
    randomize(module)
    x = torch.randn(sum(LENGTHS), 1, 192, device="cuda")
    row = run(module, backend, x, packed(LENGTHS))
    module.config.ssm_backend = "torch"  # causal-conv1d refuses a row of one token
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = torch.cat([module(document)[0] for document in x.split(LENGTHS)])
    (y * linspace_like(y)).sum().backward()
    alone = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    errors = {name: ((row[name] - alone[name]).norm() / alone[name].norm()).item() for name in alone}
    worst = max(errors, key=errors.get)
    largest = ((row["y"] - alone["y"]).abs().max() / alone["y"].abs().max()).item()
    report(test="ssm packed", backend=backend, error=largest, worst=worst, worst_error=errors[worst])
    assert largest < (1e-5 if backend == "torch" else 2e-3)
    assert errors[worst] < (1e-5 if backend == "torch" else 5e-3), errors
