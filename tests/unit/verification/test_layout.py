import pytest

from falcon_bridge.errors import UserError
from falcon_bridge.verification.checkpoints import random_config
from falcon_bridge.verification.layout import ParallelLayout


def check(layout, *, seq_length=64, batch_size=8, device="cpu", **overrides):
    layout.check(random_config("plain", **overrides), seq_length=seq_length, batch_size=batch_size, device=device)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(tp=2, sequence_parallel=True),
        ParallelLayout(tp=4),  # twice the key-value heads, four times the groups
        ParallelLayout(pp=2),
        ParallelLayout(pp=2, dp=2),
        ParallelLayout(tp=2, pp=2, dp=2),
    ],
    ids=str,
)
def test_accepts(layout):
    check(layout)


@pytest.mark.parametrize(
    ("layout", "options", "says"),
    [
        (ParallelLayout(tp=3), {}, "--tp 3 does not divide the model's 4 attention heads: it can be 1, 2, 4"),
        (ParallelLayout(tp=2), {"intermediate_size": 81}, "81 MLP channels"),
        (ParallelLayout(tp=4), {"mamba_n_heads": 2, "mamba_d_head": 32}, "2 SSM heads"),
        (
            ParallelLayout(tp=2),
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            "--tp 2 must divide the model's 3 key-value heads",
        ),
        (ParallelLayout(sequence_parallel=True), {}, "give --tp 2"),
        (ParallelLayout(tp=2, sequence_parallel=True), {"seq_length": 33}, "multiple of tp = 2, not 33"),
        (ParallelLayout(vp=2), {}, "--vp needs pipeline parallelism"),
        (ParallelLayout(pp=2), {"num_hidden_layers": 3}, "3 layers do not split evenly over pp·vp = 2"),
        (ParallelLayout(pp=2, vp=2), {}, "2 layers do not split evenly over pp·vp = 4"),
        (ParallelLayout(cp=2), {}, "use --cp 1"),
        (ParallelLayout(cp=2), {"device": "cuda", "seq_length": 62}, "multiple of 2·cp = 4"),
        (ParallelLayout(dp=3), {}, "--batch-size 8 must be a multiple of dp·pp = 3"),
        (ParallelLayout(pp=2, dp=2), {"batch_size": 6}, "dp·pp = 4"),
        (ParallelLayout(dp=0), {}, "--dp must be at least 1"),
    ],
)
def test_refuses_with_what_to_change(layout, options, says):
    with pytest.raises(UserError) as error:
        check(layout, **options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_uneven_stages_may_be_given():
    check(ParallelLayout(pp=2, first_stage_layers=1, last_stage_layers=2), num_hidden_layers=3)
    check(ParallelLayout(pp=2, pipeline_layout="Et|ttL"), num_hidden_layers=3)


def test_description_is_json_with_the_sizes():
    layout = ParallelLayout(tp=2, pp=2, vp=2, sequence_parallel=True)
    assert layout.describe() == {"tp": 2, "pp": 2, "vp": 2, "cp": 1, "dp": 1, "sequence_parallel": True}
    assert layout.world_size == 4
    assert str(layout) == "TP2×PP2×VP2×SP"
    assert ParallelLayout(pp=2, pipeline_layout="Et|ttL").describe()["pipeline_layout"] == "Et|ttL"
    assert str(ParallelLayout(tp=11)) == "TP11"
    assert str(ParallelLayout()) == "one process"
