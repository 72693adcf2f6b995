"""Tables whose cells are whole at any width, and numbers of parameters."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.table import Table


def fitted_table(
    title: str, columns: dict[str, list[str]], *, order: list[str], left: set[str], width: int | None
) -> tuple["Table", list[str]]:
    """A table that neither cuts nor wraps a cell: what does not fit is left out by column.

    Args:
        title: above it.
        columns: cells by heading.
        order: headings by importance, most important first; the first always stays.
        left: headings of left-justified columns; the others are right-justified.
        width: character cells there are; None for no limit.

    Returns:
        The table and the headings left out.
    """
    from rich.cells import cell_len
    from rich.table import Table

    room, kept = float("inf") if width is None else width - 1, []
    for heading in order:
        # a blank on either side and a border
        room -= max(cell_len(text) for text in (heading, *columns[heading])) + 3
        if kept and room < 0:
            break
        kept.append(heading)
    table = Table(title=title)
    shown = [heading for heading in columns if heading in kept]
    for heading in shown:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for row in zip(*(columns[heading] for heading in shown), strict=True):
        table.add_row(*row)
    return table, [heading for heading in columns if heading not in kept]


def parameters(number: int) -> str:
    """A number of parameters with three digits, in thousands (K), millions (M) or billions (B)."""
    for scale, unit, least in ((1e9, "B", 1e8), (1e6, "M", 1e5)):
        if number >= least:
            value = number / scale
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
    return f"{number / 1e3:.1f} K"
