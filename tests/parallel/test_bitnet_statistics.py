"""Statistics of the codes over tensor-parallel and pipeline ranks, against whole matrices."""

import logging

import pytest
import torch
import torch.distributed as dist

from falcon_bridge.bitnet.statistics import TernaryStatistics, ternary_linears
from falcon_bridge.ranks import run_ranks
from tests.unit.bitnet.test_statistics import IN, Layer, check, weights_of
from tests.unit.bitnet.weights import draw


LAYOUTS = {"TP 4": (4, 1), "TP 2, PP 2": (2, 2)}  # there are two key-value heads
STEPS = (0, 1, 2)


def shard(name, weight, tp, rank):
    """A rank's part of a weight."""
    if "linear_fc2" in name:
        return weight.chunk(tp, dim=1)[rank]
    if "linear_fc1" in name:
        gate, up = weight.chunk(2)
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
    return weight.chunk(tp)[rank]


def collect(tp, pp):
    """The statistics of the two layers on this rank, each stage with its share of them."""
    stages = [dist.new_group(range(stage * tp, (stage + 1) * tp)) for stage in range(pp)]
    pipelines = [dist.new_group(range(first, tp * pp, tp)) for first in range(tp)]
    stage, rank = divmod(dist.get_rank(), tp)
    layers = (0, 1) if pp == 1 else (stage,)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Layer(5 + layer, stages[stage]) for layer in layers])
    statistics = TernaryStatistics(ternary_linears([model]))
    for step in STEPS:
        whole = weights_of(step)[1]
        with torch.no_grad():
            for i, layer in enumerate(layers):
                for name, parameter in model.layers[i].named_parameters():
                    parameter.copy_(shard(name, whole[f"layers.{layer}.{name}"], tp, rank))
        statistics.begin_step()
        for layer in model.layers:
            layer.linear_qkv(draw(2, 3, IN))
            layer.linear_fc2(layer.linear_fc1(draw(2, 3, IN))[0])
        statistics.end_step()
    return statistics.collect(pipelines[rank])


def on_a_rank():
    logging.disable(logging.WARNING)
    return {name: collect(*layout) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def collected():
    return run_ranks(on_a_rank, 4, device="cpu", timeout_seconds=120)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_statistics_of_whole_matrices(collected, layout):
    for of_rank in collected:
        assert of_rank[layout] == collected[0][layout]
    check(collected[0][layout], STEPS)
