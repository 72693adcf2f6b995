from types import SimpleNamespace

import pytest
import torch

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.models.falcon_h1.norm import GroupedRMSNorm, RMSNorm


class OneRank:
    """As much of a process group as a norm asks for."""

    def size(self):
        return 1

    def rank(self):
        return 0


def draw(*shape, seed=0, std=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std


def naive(x, weight, groups, eps):
    """Group by group, token by token."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        parts = [part / torch.sqrt((part * part).mean() + eps) for part in row.chunk(groups)]
        rows.append(torch.cat(parts) * weight)
    return torch.stack(rows).view(x.shape)


def grouped(width, groups, eps, dtype=torch.float64):
    with cpu_runtime():
        norm = GroupedRMSNorm(width, groups, eps, OneRank(), dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * draw(width, seed=5))
    return norm


def plain(width, eps, dtype=torch.float64, sequence_parallel=False):
    with cpu_runtime():
        norm = RMSNorm(
            SimpleNamespace(use_cpu_initialization=False, params_dtype=dtype, sequence_parallel=sequence_parallel),
            width,
            eps=eps,
        )
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * draw(width, seed=5))
    return norm


def values_and_gradients(norm, x, dy):
    x = x.detach().requires_grad_()
    y = norm(x)
    return {"y": y.detach()} | dict(zip(("dx", "dw"), torch.autograd.grad(y, [x, norm.weight], dy), strict=True))


def expected_of(norm, x, dy, groups, eps):
    x = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    y = naive(x, weight, groups, eps)
    return {"y": y.detach()} | dict(zip(("dx", "dw"), torch.autograd.grad(y, [x, weight], dy.double()), strict=True))


def assert_close(actual, expected, tolerance):
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape, name
        assert (actual[name].double() - reference).abs().max() <= tolerance * reference.abs().max(), name


# rows of very different sizes: eps dominates some of them, and none of the others
X = draw(5, 2, 42, std=3.0) * torch.tensor([1e-4, 1e-2, 1.0, 30.0, 1e3], dtype=torch.float64).view(5, 1, 1)
DY = draw(5, 2, 42, seed=1)


@pytest.mark.parametrize("eps", [1e-5, 2e-3])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_norm_is_the_formula(groups, eps):
    norm = grouped(42, groups, eps)
    assert_close(values_and_gradients(norm, X, DY), expected_of(norm, X, DY, groups, eps), 1e-13)


def test_groups_are_told_apart():
    """What the test above relies on: a wrong number of groups does not pass for the right one."""
    norm = grouped(42, 2, 1e-5)
    with pytest.raises(AssertionError, match="y"):
        assert_close(values_and_gradients(norm, X, DY), expected_of(norm, X, DY, 3, 1e-5), 1e-2)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_norm_equals_transformers(groups):
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated

    norm = grouped(42, groups, 3e-4, torch.float32)
    reference = FalconH1RMSNormGated(42, eps=3e-4, n_groups=groups, norm_before_gate=False)
    reference.load_state_dict({"weight": norm.weight})
    x, gate = X.float(), draw(5, 2, 42, seed=2, std=2.0).float()
    gated = x * torch.nn.functional.silu(gate)
    torch.testing.assert_close(norm(gated), reference(x, gate), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-6, 2e-3])
def test_norm_is_the_formula(eps):
    norm = plain(42, eps)
    assert_close(values_and_gradients(norm, X, DY), expected_of(norm, X, DY, 1, eps), 1e-13)


@pytest.mark.parametrize("groups", [1, 3])
def test_bf16_is_normalised_in_fp32_and_rounded_once(groups):
    """The nearest bf16 to the fp64 formula, but for a few near-ties."""
    norm = grouped(42, groups, 1e-5, torch.bfloat16)
    x = X.bfloat16()
    y = norm(x)
    exact = naive(x.double(), norm.weight.double(), groups, 1e-5)
    assert y.dtype == torch.bfloat16
    assert (y == exact.bfloat16()).double().mean() > 0.99


def test_fp32_weight_does_not_widen_bf16_activations():
    assert grouped(42, 2, 1e-5, torch.float32)(X.bfloat16()).dtype == torch.bfloat16


def test_layout_of_the_input_does_not_matter():
    norm = grouped(42, 2, 1e-5)
    x = X.transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous()
    assert torch.equal(norm(x), norm(X))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_weights_carry_the_marks_that_megatron_reads(sequence_parallel):
    """Without them gradients are not summed over ranks (sequence parallelism) or the weight is taken for a copy."""
    assert plain(8, 1e-5, sequence_parallel=sequence_parallel).weight.sequence_parallel is sequence_parallel
    weight = grouped(8, 2, 1e-5).weight
    assert weight.tensor_model_parallel is True
    assert weight.partition_dim == 0
