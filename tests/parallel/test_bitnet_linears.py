"""BitNet linears over tensor-parallel ranks, against the reference's layer on whole weights and all tokens.

Each Hugging Face matrix, shard and block of features has its own standard deviation.
"""

import logging
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from falcon_bridge.bitnet.backends import ReferenceBackend
from falcon_bridge.bitnet.reference import bitlinear, quantize_weight_segmented
from falcon_bridge.bitnet.strength import BlendedBackend, set_quantization_strength
from falcon_bridge.ranks import run_ranks
from tests.unit.bitnet.linears import column, holding, row
from tests.unit.bitnet.weights import draw, fused, uneven


TOKENS, BATCH, IN = 8, 3, 44

# the only thing that Megatron's linears ask CUDA for
without_cuda = mock.patch("torch.cuda.current_device", lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Case:
    """A layer; `kind` is what its weight holds, or "row"."""

    kind: str
    sequence_parallel: bool = False
    accumulate: bool = False
    recompute: bool = False
    bias: bool = False
    strength: float = 1.0
    dtype: torch.dtype = torch.float32

    def __str__(self):
        flags = ("sequence_parallel", "accumulate", "recompute", "bias")
        words = [self.kind, *(flag for flag in flags if getattr(self, flag))]
        words += [f"strength {self.strength}"] * (self.strength < 1) + ["bf16"] * (self.dtype == torch.bfloat16)
        return ", ".join(words)


CASES = [
    *(Case(kind, sp) for kind in ("qkv", "gate_up", "single", "row") for sp in (False, True)),
    *(Case(kind, sp, accumulate=True) for kind in ("qkv", "row") for sp in (False, True)),
    Case("gate_up", True, accumulate=True, recompute=True),
    Case("row", True, recompute=True),
    *(Case(kind, bias=True) for kind in ("single", "row")),
    Case("row", True, bias=True),
    *(Case(kind, sp, strength=0.4) for kind in ("qkv", "row") for sp in (False, True)),
    *(Case(kind, True, accumulate=True, dtype=torch.bfloat16) for kind in ("gate_up", "row")),
]


def whole(case):
    """Weight, row segments, number of matrices and bias."""
    if case.kind in ("qkv", "gate_up"):
        W, segments, number = fused(case.kind, IN, dtype=case.dtype)
    else:
        W, segments, number = uneven(24, IN, dtype=case.dtype), None, 1
    return W, segments, number, draw(len(W), seed=8, dtype=case.dtype) if case.bias else None


def tokens(case, out_features, micro_batch):
    """Activations whose blocks of features and tokens differ in scale, and a gradient of the output."""
    features = 3.0 ** (torch.arange(IN) * 4 // IN)
    x = draw(TOKENS, BATCH, IN, seed=20 + micro_batch) * features * (1 + torch.arange(TOKENS)[:, None, None])
    return x.to(case.dtype), draw(TOKENS, BATCH, out_features, seed=30 + micro_batch, dtype=case.dtype)


def expected_outcome(case):
    """Outputs, gradients of the inputs of each micro-batch, and the sums of those of weight and bias, all fp32."""
    W, segments, number, bias = whole(case)
    backend = ReferenceBackend()
    codes, scales = quantize_weight_segmented(W, segments, number)
    row_scales = scales if segments is None else scales[segments]
    outputs, input_grads, weight_grad = [], [], torch.zeros(W.shape)
    bias_grad = torch.zeros(len(W))
    for micro_batch in range(1 + case.accumulate):
        x, dy = tokens(case, len(W), micro_batch)
        latent = W.clone().float().requires_grad_()
        x = x.requires_grad_()
        if case.strength == 1:
            y = bitlinear(x, latent, row_segments=segments, num_segments=number)
            y.backward(dy)
            gradients = x.grad, latent.grad
        else:
            blended = BlendedBackend(backend, case.strength)
            x_2d, dy_2d = x.detach().flatten(0, 1), dy.flatten(0, 1)
            x_blended, _ = blended.quantize_activation(x_2d)
            W_blended = blended.quantize_weight(W, row_scales)
            y = (x_blended @ W_blended.T).view_as(dy)
            gradients = (dy_2d @ W_blended).view_as(x), dy_2d.T @ x_blended
        outputs.append(y.detach() if bias is None else y.detach() + bias)
        input_grads.append(gradients[0])
        weight_grad += gradients[1]
        bias_grad += dy.float().sum((0, 1))
    return codes, outputs, input_grads, weight_grad, bias_grad


def own_rows(case, tensor, rank, size):
    """This rank's part of what has an entry for each output feature of a column-parallel layer, along dimension 0."""
    if case.kind == "gate_up":
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size)[rank]


def difference(actual, expected):
    scale = expected.float().abs().max()
    return ((actual.float() - expected.float()).abs().max() / scale).item()


def outcome_of(case):
    """Differences on this rank, by what differs."""
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    W, segments, _, bias = whole(case)
    fields = {
        "sequence_parallel": case.sequence_parallel,
        "gradient_accumulation_fusion": case.accumulate,
        "params_dtype": case.dtype,
    }
    if case.kind == "row":
        linear = row(len(W), IN, group, bias=case.bias, fields=fields)
        holding(linear, W.chunk(size, dim=1)[rank], bias)
    else:
        matrices = None if segments is None else case.kind
        linear = column(len(W), IN, group, matrices=matrices, bias=case.bias, fields=fields)
        holding(linear, own_rows(case, W, rank, size), None if bias is None else own_rows(case, bias, rank, size))
    if case.accumulate:
        linear.weight.main_grad, linear.weight.grad_added_to_main_grad = torch.zeros(linear.weight.shape), False

    def of_rank(whole_tensor, *, is_input):
        """The part of activations, outputs or their gradients that this rank has."""
        if is_input == (case.kind == "row"):
            if is_input:
                return whole_tensor.chunk(size, dim=-1)[rank]
            return own_rows(case, whole_tensor.movedim(-1, 0), rank, size).movedim(0, -1)
        return whole_tensor.chunk(size)[rank] if case.sequence_parallel else whole_tensor

    codes, outputs, input_grads, weight_grad, bias_grad = expected_outcome(case)
    set_quantization_strength(case.strength)
    differences = {"y": 0.0, "dx": 0.0}
    for micro_batch, (y_expected, dx_expected) in enumerate(zip(outputs, input_grads, strict=True)):
        x, dy = tokens(case, len(W), micro_batch)
        x = of_rank(x, is_input=True).clone().requires_grad_()
        if case.recompute:
            y = checkpoint(lambda x: linear(x)[0], x, use_reentrant=bool(micro_batch % 2))
        else:
            y, _ = linear(x)
        y.backward(of_rank(dy, is_input=False))
        differences["y"] = max(differences["y"], difference(y.detach(), of_rank(y_expected, is_input=False)))
        differences["dx"] = max(differences["dx"], difference(x.grad, of_rank(dx_expected, is_input=True)))
    set_quantization_strength(1.0)

    if case.kind == "row":
        codes, weight_grad = (tensor.chunk(size, dim=1)[rank] for tensor in (codes, weight_grad))
    else:
        codes, weight_grad = (own_rows(case, tensor, rank, size) for tensor in (codes, weight_grad))
        bias_grad = own_rows(case, bias_grad, rank, size)
    differences["codes"] = (linear.weight_codes().codes != codes).sum().item()
    differences["dW"] = difference(linear.weight.main_grad if case.accumulate else linear.weight.grad, weight_grad)
    if case.bias:
        own = linear.bias.grad.clone()
        if case.kind == "row" and case.sequence_parallel:
            dist.all_reduce(own)  # as Megatron does for parameters that are marked so
            assert linear.bias.sequence_parallel
        differences["db"] = difference(own, bias_grad)
    return differences


@without_cuda
def on_a_rank(_):
    logging.disable(logging.WARNING)
    return {str(case): outcome_of(case) for case in CASES}


@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_the_whole_layer(world_size):
    for rank, results in enumerate(run_ranks(on_a_rank, world_size, None, device="cpu", timeout_seconds=60)):
        for case in CASES:
            found = results[str(case)]
            assert found.pop("codes") == 0
            if case.kind != "row" and case.strength == 1 and case.dtype == torch.float32:
                assert found["y"] == 0, case
            # in bf16 each rank's part of a sum is rounded
            limit = 2e-6 if case.dtype == torch.float32 else 2e-2
            assert all(value <= limit for value in found.values()), f"rank {rank}: {case}: {found}"


@without_cuda
def bad_values(_):
    """What reaches this rank of a NaN or infinity in the features, tokens or weights of the first rank."""
    logging.disable(logging.WARNING)
    group = dist.group.WORLD
    first, found = group.rank() == 0, {}
    for bad in (float("nan"), float("inf")):
        for sequence_parallel in (False, True):
            fields = {"sequence_parallel": sequence_parallel}
            linear = holding(row(12, 20, group, fields=fields), uneven(12, 20).chunk(2, dim=1)[group.rank()])
            x = draw(4, 1, 20).chunk(2, dim=-1)[group.rank()].clone()
            if first:
                x[1, 0, 3] = bad
            y, _ = linear(x)
            y.sum().backward()
            rows = y.isnan().any(-1).flatten().tolist()
            found["x", bad, sequence_parallel] = rows, linear.weight.grad.isnan().all().item()

        W, _, _ = fused("qkv", 20)
        W = W.chunk(2)[group.rank()].clone()
        linear = holding(column(72, 20, group, matrices="qkv"), W)
        k_rows = linear.row_segments == 1
        if first:
            with torch.no_grad():
                linear.weight[k_rows.nonzero()[0], 5] = bad
        y, _ = linear(draw(2, 1, 20))
        found["W", bad] = y[..., k_rows].isnan().all().item(), y[..., ~k_rows].isfinite().all().item()
    return found


def test_bad_values_reach_every_rank():
    ranks = run_ranks(bad_values, 2, None, device="cpu", timeout_seconds=60)
    for rank, found in enumerate(ranks):
        for (kind, *where), outcome in found.items():
            if kind == "W":
                assert outcome == (True, True), where
                continue
            rows = [False, True, False, False]
            # with sequence parallelism a rank has the output of its own tokens
            assert outcome == (rows[2 * rank : 2 * rank + 2] if where[1] else rows, True), where


def saved_and_sent(_):
    """Saved tensors and collectives of a forward and backward pass of a column-parallel layer, by kind."""
    logging.disable(logging.WARNING)
    group, calls, saved = dist.group.WORLD, [], []

    def note(tensor):
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    def spy(name):
        original = getattr(dist, name)

        def call(*tensors, **kwargs):
            calls.append((name, tuple(tensors[0].shape), tensors[0].dtype, kwargs.get("async_op", False)))
            return original(*tensors, **kwargs)

        return call

    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    originals = {name: getattr(dist, name) for name in names}
    linear = holding(column(8, 20, group, fields={"sequence_parallel": True}), uneven(4, 20))
    x = draw(3, 2, 20, dtype=torch.float32).requires_grad_()
    try:
        for name in names:
            setattr(dist, name, spy(name))
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                y, _ = linear(x)
            y.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls, saved


def test_what_sequence_parallelism_saves_and_sends():
    for calls, saved in run_ranks(saved_and_sent, 2, None, device="cpu", timeout_seconds=60):
        assert saved == 2 * [
            ((4, 20), torch.int8),
            ((1,), torch.float32),
            ((6, 20), torch.int8),
            ((6, 1), torch.float32),
        ]
        gathers = 2 * [
            ("all_gather_into_tensor", (12, 20), torch.int8, True),
            ("all_gather_into_tensor", (12, 1), torch.float32, True),
        ]
        reduction = [("reduce_scatter_tensor", (6, 20), torch.float32, True)]
        # the sum behind the weight's scale once, as in a step of two micro-batches
        assert calls == [("all_reduce", (1,), torch.float64, False), *2 * (gathers + reduction)]
