from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_bridge.bitnet import statistics
from falcon_bridge.bitnet.reference import quantize_weight
from falcon_bridge.bitnet.statistics import TernaryStatistics, _pack, _unpack, ternary_linears

from .linears import column, row
from .weights import draw, fused, uneven


IN = 24
NAMES = {"linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": None}


class Layer(torch.nn.Module):
    def __init__(self, number, group):
        super().__init__()
        self.layer_number = number
        self.linear_qkv = column(72, IN, group, matrices="qkv")
        self.linear_fc1 = column(40, IN, group, matrices="gate_up")
        self.linear_fc2 = row(IN, 40, group)

    def forward(self, x):
        self.linear_qkv(x)
        self.linear_fc2(self.linear_fc1(x)[0])


class Model(torch.nn.Module):
    """Two layers of a later pipeline stage, and a linear that is not ternary."""

    def __init__(self, group):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(number, group) for number in (5, 6)])
        self.output_layer = torch.nn.Linear(IN, 10)

    def forward(self, x):
        for layer in self.layers:
            layer(x)


def weights_of(step):
    """Hugging Face name -> matrix, Megatron name -> weight, of both layers after `step` optimizer steps."""
    matrices, megatron = {}, {}
    for layer in (0, 1):
        for name in NAMES:
            if name == "linear_fc2":
                weight, segments = uneven(IN, 40, seed=layer), None
            else:
                weight, segments, _ = fused("qkv" if name == "linear_qkv" else "gate_up", IN, seed=layer)
            weight = weight * (1 + layer) + step * 0.03 * draw(*weight.shape, seed=10 * step + layer) * weight.std()
            megatron[f"layers.{layer}.{name}.weight"] = weight
            for i, matrix in enumerate(NAMES[name] or ("down_proj",)):
                rows = slice(None) if segments is None else segments == i
                matrices[f"layers.{4 + layer}.{matrix}"] = weight[rows]
    return matrices, megatron


def expected(steps):
    """Statistics after `steps`, each a step number, by the definition."""
    found = {}
    for name, last in weights_of(steps[-1])[0].items():
        codes = [quantize_weight(weights_of(step)[0][name])[0] for step in steps]
        flips = [(a != b).double().mean().item() for a, b in pairwise(codes)]
        found[name] = (
            last.numel(),
            (codes[-1] == 0).double().mean().item(),
            sum(flips) / len(flips) if flips else None,
            last.double().abs().mean().item(),
        )
    return found


def check(collected, steps):
    wanted = expected(steps)
    assert list(collected) == list(wanted)
    for name, (elements, zeros, flips, scale) in wanted.items():
        matrix = collected[name]
        assert matrix.elements == elements
        assert matrix.zeros == pytest.approx(zeros, abs=1e-12)
        assert matrix.flips == (None if flips is None else pytest.approx(flips, abs=1e-12))
        assert matrix.scale == pytest.approx(scale, rel=1e-6)


@pytest.fixture
def model(one_rank):
    return Model(one_rank)


def load(model, step):
    model.load_state_dict(weights_of(step)[1], strict=False)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 7), (64, 33)])
def test_packed_codes_come_back(shape):
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = _pack(codes)
    assert packed.numel() == -(-codes.numel() // 4) and packed.dtype == torch.uint8
    assert torch.equal(_unpack(packed, codes.shape), codes)


def test_linears_are_found_by_their_number_in_the_whole_model(model):
    linears = ternary_linears([torch.nn.ModuleDict({"module": model})])
    assert list(linears) == [f"layers.{layer}.{name}" for layer in (4, 5) for name in NAMES]
    assert linears["layers.5.linear_fc2"] is model.layers[1].linear_fc2


def test_counts_what_the_definition_says(model):
    statistics = TernaryStatistics(ternary_linears([model]))
    assert statistics.collect() == {}
    seen = []
    for step in (0, 1, 2, 3, 4):
        load(model, step)
        statistics.begin_step()
        for _ in range(3):  # micro-batches
            model(draw(2, 3, IN, seed=step))
        statistics.end_step()
        seen.append(step)
        if step in (0, 3, 4):
            check(statistics.collect(), seen)
            seen = [step]


def test_replays_of_a_cuda_graph_are_counted(model, monkeypatch):
    """A replay does on the device what the captured step did, in the same memory, and calls no hook."""
    found = TernaryStatistics(ternary_linears([model]))
    followed = list(found._followed.values())
    for step in range(6):
        load(model, step)
        found.begin_step()
        monkeypatch.setattr(statistics, "capture_id", lambda device, step=step: 5 if step >= 2 else 0)
        before = [(one.compared, one.has_codes and one._codes.data_ptr()) for one in followed]
        model(draw(2, 3, IN, seed=step))
        for one, (compared, where) in zip(followed, before, strict=True):
            assert step == 0 or one._codes.data_ptr() == where
            if step > 2:
                one.compared, one.pending = compared, True
        found.end_step()
    check(found.collect(), list(range(6)))


def test_only_training_steps_count(model):
    statistics = TernaryStatistics(ternary_linears([model]))
    for step in (0, 1):
        load(model, step)
        statistics.begin_step()
        model(draw(2, 3, IN))
        statistics.end_step()
        load(model, step + 7)  # a validation with other weights
        model(draw(2, 3, IN))
    check(statistics.collect(), [0, 1])
    statistics.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_step_below_full_strength_counts_its_ternary_codes(model):
    from falcon_bridge.bitnet import set_quantization_strength

    statistics = TernaryStatistics(ternary_linears([model]))
    try:
        for step, strength in ((0, 0.0), (1, 0.4)):
            set_quantization_strength(strength)
            load(model, step)
            statistics.begin_step()
            model(draw(2, 3, IN))
            statistics.end_step()
    finally:
        set_quantization_strength(1.0)
    check(statistics.collect(), [0, 1])


def test_a_nan_weight_shows(model):
    statistics = TernaryStatistics(ternary_linears([model]))
    load(model, 0)
    with torch.no_grad():
        model.layers[1].linear_fc2.weight[2, 3] = float("nan")
    statistics.begin_step()
    model(draw(2, 3, IN))
    scales = {name: matrix.scale for name, matrix in statistics.collect().items()}
    assert [name for name, scale in scales.items() if scale != scale] == ["layers.5.down_proj"]


def test_steps_do_not_wait_for_the_device(model):
    """Looking at the codes adds no read of a value; on the CPU, the scales' own check of the row map has some."""

    class Waits(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    def waits_of_a_step(step):
        load(model, step)
        with Waits() as waits:
            model(draw(2, 3, IN))
        return waits.seen

    own = waits_of_a_step(0)
    statistics = TernaryStatistics(ternary_linears([model]))
    for step in (1, 2, 3):
        statistics.begin_step()
        assert waits_of_a_step(step) == own
        statistics.end_step()
    with Waits() as waits:
        statistics.collect()
    assert waits.seen <= 1
