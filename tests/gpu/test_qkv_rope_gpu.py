"""One kernel each way in front of core attention, against its oracle and against Megatron's steps, on the GPU."""

import pytest
import torch

from falcon_bridge.ops.qkv_rope import qkv_rope, qkv_rope_reference


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

VALUE_SCALE = 0.35
TOLERANCE = {
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
SHAPES = [  # s, b, groups, query heads a group, d
    (1021, 2, 2, 4, 64),  # Falcon-H1-0.5B
    (515, 3, 2, 4, 128),  # Falcon-H1-1.5B
    (129, 1, 4, 5, 128),  # Falcon-H1-34B
    (77, 2, 3, 1, 24),  # half a head is no power of two
    (50, 1, 1, 7, 256),
]


def rotary(s, d, start=0, base=1e11):
    """Angles fp32 `[s, 1, 1, d]` as mcore's `RotaryEmbedding.get_emb` makes them."""
    frequencies = 1.0 / base ** (torch.arange(0, d, 2, dtype=torch.float32, device="cuda") / d)
    half = torch.outer(start + torch.arange(s, dtype=torch.float32, device="cuda"), frequencies)
    return torch.cat((half, half), dim=-1)[:, None, None, :]


def draw(s, b, groups, heads, d, dtype):
    """mixed_qkv and the gradients of q, k and v, of which q's is contiguous and the others are views."""
    generator = torch.Generator("cuda").manual_seed(s + d)
    randn = lambda *shape: torch.randn(shape, generator=generator, device="cuda").to(dtype)  # noqa: E731
    mixed = 3 * randn(s, b, groups, (heads + 2) * d)
    dq = randn(s, b, groups * heads, d)
    dk, dv = randn(b, s, 2, groups, d).permute(2, 1, 0, 3, 4)
    return mixed, (dq, dk, 0.1 * dv)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle_in_fp64(shape, dtype):
    mixed, grads = draw(*shape, dtype)
    angles = rotary(shape[0], shape[-1], start=261_000)  # the last positions of a row of 256k tokens
    exact = mixed.double().requires_grad_()
    expected = qkv_rope_reference(exact, angles, VALUE_SCALE)
    expected += torch.autograd.grad(expected, exact, [grad.double() for grad in grads])
    mixed.requires_grad_()
    actual = qkv_rope(mixed, angles, VALUE_SCALE)
    actual += torch.autograd.grad(actual, mixed, grads)
    for value, wanted in zip(actual, expected, strict=True):
        assert value.dtype == dtype and value.is_contiguous()
        torch.testing.assert_close(value.double(), wanted, **TOLERANCE[dtype])


@pytest.mark.parametrize("strides", ["last dimension apart", "odd"])
def test_gradients_in_any_layout(strides):
    s, b, groups, heads, d = 65, 2, 2, 3, 64
    mixed, grads = draw(s, b, groups, heads, d, torch.bfloat16)
    angles = rotary(s, d)
    mixed.requires_grad_()
    outputs = qkv_rope(mixed, angles, VALUE_SCALE)
    (expected,) = torch.autograd.grad(outputs, mixed, [grad.contiguous() for grad in grads], retain_graph=True)
    if strides == "odd":
        grads = [torch.cat((grad, grad[..., :3]), dim=-1)[..., :d] for grad in grads]
    else:
        grads = [grad.movedim(-1, 0).contiguous().movedim(0, -1) for grad in grads]
    (actual,) = torch.autograd.grad(outputs, mixed, grads)
    assert torch.equal(actual, expected)


def test_more_elements_than_int32_counts():
    groups, heads, d = 2, 4, 64
    s = 2**31 // (groups * (heads + 2) * d) + 1000
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    angles = rotary(1000, d).repeat(s // 1000 + 1, 1, 1, 1)[:s]
    mixed = torch.empty(s, 1, groups, (heads + 2) * d, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    outputs = qkv_rope(mixed, angles, VALUE_SCALE)
    (grad,) = torch.autograd.grad(outputs, mixed, outputs)
    last = mixed[-100:].detach().requires_grad_()
    expected = qkv_rope_reference(last, angles[-100:], VALUE_SCALE)
    expected += torch.autograd.grad(expected, last, [output[-100:].contiguous() for output in outputs])
    for value, wanted in zip((*outputs, grad), expected, strict=True):
        torch.testing.assert_close(value[-100:], wanted, rtol=2**-7, atol=1e-2)


def test_against_transformer_engines_rope():
    pytest.importorskip("transformer_engine")
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb

    s, b, groups, heads, d = 4096, 2, 2, 4, 64
    mixed, grads = draw(s, b, groups, heads, d, torch.bfloat16)
    angles = rotary(s, d)

    def megatrons_steps(mixed):
        q, k, v = mixed.split([heads * d, d, d], dim=-1)
        q = fused_apply_rotary_pos_emb(q.reshape(s, b, groups * heads, d), angles)
        return q, fused_apply_rotary_pos_emb(k, angles), v * VALUE_SCALE

    results = []
    for function in (lambda mixed: qkv_rope(mixed, angles, VALUE_SCALE), megatrons_steps):
        leaf = mixed.detach().requires_grad_()
        outputs = function(leaf)
        results.append((*outputs, *torch.autograd.grad(outputs, leaf, grads)))
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < 5e-3


@pytest.fixture(scope="module")
def branch():
    """A bf16 attention branch of Falcon-H1 on Transformer Engine."""
    pytest.importorskip("transformer_engine")
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from falcon_bridge import FalconH1ModelProvider
    from falcon_bridge.models.falcon_h1.layer_specs import falcon_h1_layer_spec

    config = FalconH1ModelProvider(
        num_layers=1,
        hidden_size=256,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=64,
        ffn_hidden_size=256,
        vocab_size=128,
        mamba_num_heads=0,
        key_multiplier=0.4,
        attention_in_multiplier=0.9,
        attention_out_multiplier=0.7,
        params_dtype=torch.bfloat16,
        bf16=True,
        transformer_impl="transformer_engine",
        gradient_accumulation_fusion=False,
    )
    config.finalize()
    spec = falcon_h1_layer_spec(config).submodules.self_attention.submodules.attention
    groups = ProcessGroupCollection.use_mpu_process_groups()
    module = build_module(spec, config=config, layer_number=1, pg_collection=groups).cuda().bfloat16()
    generator = torch.Generator("cuda").manual_seed(5)
    for parameter in module.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator, device="cuda"))
    return module


def run(module, x, angles):
    """Output, gradients of the input and of what is trained, and how many bytes were kept for the backward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = module(x, None, rotary_pos_emb=angles)
    wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    grad = torch.linspace(0.5, 1.5, out.numel(), device="cuda").view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, wanted, grad)], sum(kept.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_the_branch_against_megatrons_steps(branch, monkeypatch, frozen):
    s, b = 515, 2
    x = torch.randn(s, b, 256, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(9))
    angles = rotary(s, 64)
    branch.requires_grad_(not frozen)
    assert branch._fuses(angles)
    fused, kept = run(branch, x, angles)
    with monkeypatch.context() as patch:
        patch.setattr(type(branch), "_fuses", lambda self, angles, **kwargs: False)
        stepwise, kept_of_steps = run(branch, x, angles)
    for actual, expected in zip(fused, stepwise, strict=True):
        assert relative_error(actual, expected) < 1e-2
    assert kept <= kept_of_steps


def test_the_branch_without_gradients(branch):
    x = torch.randn(33, 1, 256, device="cuda", dtype=torch.bfloat16)
    angles = rotary(33, 64)
    branch.requires_grad_(False)
    out, _ = branch(x, None, rotary_pos_emb=angles)
    with torch.no_grad():
        again, _ = branch(x, None, rotary_pos_emb=angles)
    assert not out.requires_grad and relative_error(again, out) < 5e-3
