"""Layer patterns: which kind of block stands at which depth."""

from collections.abc import Mapping


PARALLEL, MAMBA, ATTENTION, MLP = "P", "M", "*", "-"
SYMBOLS: Mapping[str, str] = {
    PARALLEL: "parallel hybrid block (attention and Mamba-2 side by side, then MLP)",
    MAMBA: "Mamba-2 only",
    ATTENTION: "attention only",
    MLP: "MLP only",
}


def resolve_pattern(
    pattern: str | None,
    num_layers: int,
    *,
    parallel_ratio: float = 0.0,
    mamba_ratio: float = 0.0,
    attention_ratio: float = 0.0,
    mlp_ratio: float = 0.0,
) -> str:
    """Return the pattern with one symbol a layer.

    Args:
        pattern: The pattern itself, or None to take the ratios, or (with all ratios 0) parallel blocks throughout.
        num_layers: Layers of the model.
        parallel_ratio: Share of parallel hybrid blocks.
        mamba_ratio: Share of Mamba-2 layers.
        attention_ratio: Share of attention layers.
        mlp_ratio: Share of MLP layers.

    Returns:
        A string of `num_layers` symbols out of `SYMBOLS`.

    Raises:
        ValueError: For an unknown symbol, a wrong length, a pattern beside ratios, or ratios that do not add up to 1.
    """
    ratios = {PARALLEL: parallel_ratio, MAMBA: mamba_ratio, ATTENTION: attention_ratio, MLP: mlp_ratio}
    if pattern is not None:
        if any(ratios.values()):
            raise ValueError("give either layer_pattern or the *_ratio fields, not both")
        return _checked(pattern, num_layers)
    if not any(ratios.values()):
        return PARALLEL * num_layers
    return spread(ratios, num_layers)


def _checked(pattern: str, num_layers: int) -> str:
    for position, symbol in enumerate(pattern):
        if symbol not in SYMBOLS:
            known = ", ".join(f"{s!r} {meaning}" for s, meaning in SYMBOLS.items())
            raise ValueError(f"layer_pattern has {symbol!r} at layer {position + 1}; the symbols are {known}")
    if len(pattern) != num_layers:
        raise ValueError(
            f"layer_pattern has {len(pattern)} symbols but the model has {num_layers} layers: one symbol a layer"
        )
    return pattern


def spread(ratios: Mapping[str, float], num_layers: int) -> str:
    """Spread kinds of layers evenly over the depth.

    Counts are the ratios times the depth, rounded by largest remainder (ties: the order of `ratios`), so they add up
    to the depth exactly. The i-th of a kind's n layers aims at depth (i + 1/2)/n, which puts a minority kind in the
    middle of its share instead of at either end.

    Args:
        ratios: Share of each symbol; they add up to 1.
        num_layers: Layers of the model.

    Returns:
        A string of `num_layers` symbols.

    Raises:
        ValueError: If a ratio is negative or they do not add up to 1.
    """
    if any(ratio < 0 for ratio in ratios.values()) or not abs(sum(ratios.values()) - 1) <= 1e-6:
        shown = ", ".join(f"{symbol}={ratio:g}" for symbol, ratio in ratios.items())
        raise ValueError(f"layer ratios must not be negative and must add up to 1, got {shown}")
    exact = {symbol: ratio * num_layers for symbol, ratio in ratios.items()}
    counts = {symbol: int(value + 1e-9) for symbol, value in exact.items()}
    by_remainder = sorted(exact, key=lambda symbol: counts[symbol] - exact[symbol])
    for symbol in by_remainder[: num_layers - sum(counts.values())]:
        counts[symbol] += 1
    order = list(ratios)
    targets = [
        ((i + 0.5) / count, order.index(symbol), symbol) for symbol, count in counts.items() for i in range(count)
    ]
    return "".join(symbol for _, _, symbol in sorted(targets))
