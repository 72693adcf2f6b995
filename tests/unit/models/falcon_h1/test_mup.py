import math

import pytest

from falcon_bridge.models.falcon_h1.mup import FalconH1Multipliers, falcon_h1_multipliers


# of the released config.json files (docs/falcon-h1.md); B's multiplier follows the state size
RELEASED = {
    "0.5B": (
        {
            "hidden_size": 1024,
            "ffn_hidden_size": 2048,
            "num_attention_heads": 8,
            "head_dim": 64,
            "d_ssm": 1536,
            "d_state": 128,
        },
        FalconH1Multipliers(
            embedding_multiplier=5.656854249492381,
            lm_head_multiplier=0.0390625,
            key_multiplier=0.39062499999999994,
            attention_in_multiplier=1.0,
            attention_out_multiplier=0.9375,
            ssm_in_multiplier=1.25,
            ssm_out_multiplier=0.23570226039551587,
            mlp_multipliers=(0.8838834764831844, 0.5859375),
            ssm_multipliers=(0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738),
        ),
    ),
    "1.5B-Deep": (
        {
            "hidden_size": 1280,
            "ffn_hidden_size": 3072,
            "num_attention_heads": 6,
            "head_dim": 128,
            "d_ssm": 1536,
            "d_state": 256,
        },
        FalconH1Multipliers(
            embedding_multiplier=5.656854249492381,
            lm_head_multiplier=0.03125,
            key_multiplier=0.17677669529663687,
            attention_in_multiplier=1.0,
            attention_out_multiplier=0.5,
            ssm_in_multiplier=1.0,
            ssm_out_multiplier=0.23570226039551587,
            mlp_multipliers=(0.7071067811865476, 0.3125),
            ssm_multipliers=(0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738),
        ),
    ),
    "7B": (
        {
            "hidden_size": 3072,
            "ffn_hidden_size": 12288,
            "num_attention_heads": 12,
            "head_dim": 128,
            "d_ssm": 3072,
            "d_state": 256,
        },
        FalconH1Multipliers(
            embedding_multiplier=5.656854249492381,
            lm_head_multiplier=0.013020833333333334,
            key_multiplier=0.030690398488999456,
            attention_in_multiplier=1.0,
            attention_out_multiplier=0.10416666666666667,
            ssm_in_multiplier=0.4166666666666667,
            ssm_out_multiplier=0.11785113019775793,
            mlp_multipliers=(0.2946278254943948, 0.032552083333333336),
            ssm_multipliers=(0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738),
        ),
    ),
    "34B": (
        {
            "hidden_size": 5120,
            "ffn_hidden_size": 21504,
            "num_attention_heads": 20,
            "head_dim": 128,
            "d_ssm": 4096,
            "d_state": 256,
        },
        FalconH1Multipliers(
            embedding_multiplier=5.656854249492381,
            lm_head_multiplier=0.0078125,
            key_multiplier=0.011048543456039804,
            attention_in_multiplier=1.0,
            attention_out_multiplier=0.0375,
            ssm_in_multiplier=0.25,
            ssm_out_multiplier=0.08838834764831845,
            mlp_multipliers=(0.1767766952966369, 0.011160714285714284),
            ssm_multipliers=(0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738),
        ),
    ),
}
SHAPE = RELEASED["0.5B"][0]


def flat(multipliers):
    return {
        f"{name}[{i}]": number
        for name, value in multipliers.as_dict().items()
        for i, number in enumerate(value if isinstance(value, tuple) else (value,))
    }


@pytest.mark.parametrize("size", RELEASED)
def test_the_law_gives_the_released_multipliers(size):
    shape, released = RELEASED[size]
    law = flat(falcon_h1_multipliers(**shape))
    for name, value in flat(released).items():
        assert math.isclose(law[name], value, rel_tol=1e-15), (name, law[name], value)


def test_each_width_moves_only_its_own_multipliers():
    """What a width must not touch stays, and what it must move moves by its power."""
    base = flat(falcon_h1_multipliers(**SHAPE))
    powers = {
        "hidden_size": {
            "lm_head_multiplier[0]": -1,
            "key_multiplier[0]": -2,
            "attention_out_multiplier[0]": -1,
            "ssm_in_multiplier[0]": -1,
            "mlp_multipliers[0]": -1,
            "mlp_multipliers[1]": -1,
        },
        "ffn_hidden_size": {"mlp_multipliers[1]": -1},
        "num_attention_heads": {"attention_out_multiplier[0]": -1},
        "head_dim": {"attention_out_multiplier[0]": -1, "key_multiplier[0]": -0.5},
        "d_ssm": {"ssm_out_multiplier[0]": -1},
        "d_state": {"ssm_multipliers[2]": -1},
    }
    assert powers.keys() == SHAPE.keys()
    for width, moved in powers.items():
        tripled = flat(falcon_h1_multipliers(**{**SHAPE, width: 3 * SHAPE[width]}))
        for name, value in base.items():
            assert tripled[name] == pytest.approx(value * 3 ** moved.get(name, 0), rel=1e-14), (width, name)


@pytest.mark.parametrize(
    ("width", "output"), [("num_attention_heads", "attention_out_multiplier"), ("d_ssm", "ssm_out_multiplier")]
)
def test_an_absent_branch_has_no_output_multiplier(width, output):
    base, without = falcon_h1_multipliers(**SHAPE), falcon_h1_multipliers(**{**SHAPE, width: 0})
    assert getattr(without, output) == 1.0
    assert {**without.as_dict(), output: None} == {**base.as_dict(), output: None}


@pytest.mark.parametrize("width", ["hidden_size", "ffn_hidden_size", "head_dim", "d_state"])
@pytest.mark.parametrize("value", [0, -64])
def test_a_width_that_is_not_positive_is_named(width, value):
    with pytest.raises(ValueError, match=rf"^{width} must be positive, got {value}$"):
        falcon_h1_multipliers(**{**SHAPE, width: value})


@pytest.mark.parametrize("width", ["num_attention_heads", "d_ssm"])
def test_negative_heads_are_refused(width):
    with pytest.raises(ValueError, match=r"^num_attention_heads and d_ssm must not be negative, got .*-1"):
        falcon_h1_multipliers(**{**SHAPE, width: -1})


def test_the_default_is_a_model_without_multipliers():
    assert set(flat(FalconH1Multipliers()).values()) == {1.0}
