import pytest

from falcon_bridge.training.notices import notices
from falcon_bridge.training.run import configure


def found(recipe, *overrides):
    return notices(configure(recipe, overrides))


def test_a_recipe_as_it_comes_has_nothing_to_note():
    assert found("falcon_h1_tiny_cpu_pretrain_config") == []
    assert found("falcon_h1_7b_pretrain_config") == []


@pytest.mark.parametrize(
    ("recipe", "backend"),
    [("falcon_edge_tiny_cpu_pretrain_config", "reference"), ("falcon_edge_1b_pretrain_config", "fused")],
)
def test_the_backend_of_ternary_layers_is_stated(recipe, backend):
    assert found(recipe) == [f"BitNet linears: backend {backend} (model.bitnet_backend=auto)"]


def test_a_shortened_schedule_is_noted():
    lines = found("falcon_edge_1b_two_stage_pretrain_config", "train.train_iters=300")
    assert any("before the learning rate has decayed" in line for line in lines)
    assert any("still warming up" in line for line in lines)


def test_a_quantisation_warm_up_that_does_not_end_is_noted():
    overrides = ("model.bitnet_warmup_steps=20", "train.train_iters=20", "scheduler.lr_decay_iters=20")
    assert "is not over" in found("falcon_edge_tiny_cpu_pretrain_config", *overrides)[1]
