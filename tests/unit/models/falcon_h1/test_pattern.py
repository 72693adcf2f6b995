from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_bridge.models.falcon_h1.pattern import ATTENTION, MAMBA, MLP, PARALLEL, SYMBOLS, resolve_pattern, spread


FIELDS = {
    PARALLEL: "parallel_ratio",
    MAMBA: "mamba_ratio",
    ATTENTION: "attention_ratio",
    MLP: "mlp_ratio",
}
patient = settings(deadline=None, derandomize=True, database=None)
patterns = st.text(st.sampled_from(sorted(SYMBOLS)), min_size=1, max_size=80)


@st.composite
def ratios(draw):
    weights = draw(st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any))
    return {symbol: weight / sum(weights) for symbol, weight in zip(SYMBOLS, weights, strict=True)}


@patient
@given(pattern=patterns)
def test_a_pattern_is_taken_as_it_is(pattern):
    assert resolve_pattern(pattern, len(pattern)) == pattern


@patient
@given(num_layers=st.integers(0, 100))
def test_without_anything_all_layers_are_parallel(num_layers):
    assert resolve_pattern(None, num_layers) == "P" * num_layers


@patient
@given(shares=ratios(), num_layers=st.integers(1, 100))
def test_ratios_give_their_counts(shares, num_layers):
    pattern = resolve_pattern(None, num_layers, **{FIELDS[symbol]: share for symbol, share in shares.items()})
    assert pattern == spread(shares, num_layers)
    assert len(pattern) == num_layers
    counts = Counter(pattern)
    for symbol, share in shares.items():
        assert abs(counts[symbol] - share * num_layers) < 1 + 1e-9, symbol
        if share == 0:
            assert counts[symbol] == 0


@patient
@given(shares=ratios(), num_layers=st.integers(1, 100))
def test_exact_shares_are_met_exactly(shares, num_layers):
    counts = Counter(spread(shares, num_layers))
    for symbol, share in shares.items():
        if abs(share * num_layers - round(share * num_layers)) < 1e-9:
            assert counts[symbol] == round(share * num_layers)


@patient
@given(minority=st.integers(1, 30), majority=st.integers(1, 90), symbols=st.permutations(sorted(SYMBOLS)))
def test_a_minority_stands_evenly_between_a_majority(minority, majority, symbols):
    """Gaps, ends included, differ by at most one; those at the ends are half as long."""
    minority, majority = sorted((minority, majority))
    few, many = symbols[:2]
    total = minority + majority
    pattern = spread({few: minority / total, many: majority / total}, total)
    assert Counter(pattern) == Counter({few: minority, many: majority})
    if minority == majority:
        assert pattern in ((few + many) * minority, (many + few) * minority)
        return
    first, *between, last = [len(gap) for gap in pattern.split(few)]
    assert max(between, default=0) - min(between, default=0) <= 1
    for end in (first, last):
        assert abs(end - majority / minority / 2) <= 1


@patient
@given(shares=ratios(), num_layers=st.integers(1, 60))
def test_every_kind_is_spread_over_the_depth(shares, num_layers):
    """In any prefix each kind has about its share: a lump anywhere would break this."""
    pattern = spread(shares, num_layers)
    counts = Counter(pattern)
    for depth in range(num_layers + 1):
        for symbol, count in counts.items():
            assert abs(pattern[:depth].count(symbol) - count * depth / num_layers) <= len(counts), (depth, symbol)


@patient
@given(shares=ratios(), num_layers=st.integers(1, 60))
def test_spreading_is_a_function_of_the_ratios(shares, num_layers):
    """Every rank and every resumed run must come to the same model."""
    assert len({spread(dict(shares), num_layers) for _ in range(3)}) == 1


def test_ties_go_by_the_order_of_the_ratios():
    assert spread({PARALLEL: 0.5, MAMBA: 0.5}, 3) == "PMP"
    assert spread({MAMBA: 0.5, PARALLEL: 0.5}, 3) == "MPM"
    assert spread({PARALLEL: 0.25, MAMBA: 0.25, ATTENTION: 0.25, MLP: 0.25}, 4) == "PM*-"


@pytest.mark.parametrize(
    ("shares", "num_layers", "pattern"),
    [
        ({PARALLEL: 0.75, MAMBA: 0.25}, 4, "PPMP"),
        ({MAMBA: 0.75, ATTENTION: 0.25}, 8, "MM*MMM*M"),
        ({PARALLEL: 0.8, ATTENTION: 0.2}, 5, "PP*PP"),
        ({PARALLEL: 1 / 3, MAMBA: 1 / 3, MLP: 1 / 3}, 3, "PM-"),
    ],
)
def test_known_spreads(shares, num_layers, pattern):
    assert spread(shares, num_layers) == pattern


@patient
@given(pattern=patterns, data=st.data())
def test_the_first_unknown_symbol_is_named_with_its_layer(pattern, data):
    position = data.draw(st.integers(0, len(pattern) - 1))
    symbol = data.draw(st.sampled_from("pm+Xé "))
    spoiled = pattern[:position] + symbol + pattern[position + 1 :] + "?"
    with pytest.raises(ValueError) as error:
        resolve_pattern(spoiled, len(spoiled))
    message = str(error.value)
    assert message.startswith(f"layer_pattern has {symbol!r} at layer {position + 1}; ")
    assert all(repr(known) in message for known in SYMBOLS)
    assert "\n" not in message


@patient
@given(pattern=patterns, difference=st.integers(-80, 80).filter(bool))
def test_a_wrong_length_is_named(pattern, difference):
    num_layers = len(pattern) + difference
    message = f"layer_pattern has {len(pattern)} symbols but the model has {num_layers} layers"
    with pytest.raises(ValueError, match=message):
        resolve_pattern(pattern, num_layers)


def test_an_empty_pattern_is_not_no_pattern():
    with pytest.raises(ValueError, match="has 0 symbols but the model has 2 layers"):
        resolve_pattern("", 2)


@pytest.mark.parametrize("field", FIELDS.values())
def test_pattern_and_ratio_together_are_refused(field):
    with pytest.raises(ValueError, match=r"either layer_pattern or the .*_ratio fields, not both"):
        resolve_pattern("PP", 2, **{field: 1.0})


@pytest.mark.parametrize(
    "shares",
    [
        {"parallel_ratio": 0.5},
        {"parallel_ratio": 0.8, "mamba_ratio": 0.3},
        {"parallel_ratio": 1.5, "mlp_ratio": -0.5},
        {"mamba_ratio": float("nan")},
    ],
)
def test_ratios_that_do_not_add_up_are_shown(shares):
    with pytest.raises(ValueError, match="must not be negative and must add up to 1, got P=") as error:
        resolve_pattern(None, 4, **shares)
    for value in shares.values():
        assert f"={value:g}" in str(error.value)
