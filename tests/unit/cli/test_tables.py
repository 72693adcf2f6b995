"""Tables are whole at 80 columns and in a pipe."""

import io

import pytest
from rich.console import Console

from falcon_bridge.cli.session import Session
from falcon_bridge.cli.tables import fitted_table, parameters


COLUMNS = {"name": ["n" * 34, "short"], "what": ["w" * 70, "x"], "number": ["91.1 M", "0.52 B"]}
ORDER = ["name", "number", "what"]


@pytest.mark.parametrize(
    ("width", "hidden"), [(None, []), (200, []), (80, ["what"]), (50, ["what"]), (20, ["what", "number"])]
)
def test_what_does_not_fit_is_left_out_whole(width, hidden):
    table, left_out = fitted_table("t", COLUMNS, order=ORDER, left={"name"}, width=width)
    assert left_out == hidden
    output = io.StringIO()
    Console(file=output, width=max(width or 200, 40)).print(table)
    shown = [heading for heading in COLUMNS if heading not in hidden]
    for row in zip(*(COLUMNS[heading] for heading in shown), strict=True):
        (line,) = [line for line in output.getvalue().splitlines() if row[0] in line]
        assert all(cell in line for cell in row)
    # exactly as wide as computed: one less, and a column goes
    used = max(map(len, output.getvalue().splitlines()))
    if len(shown) > 1:
        assert fitted_table("t", COLUMNS, order=ORDER, left=set(), width=used)[1] == hidden
        assert fitted_table("t", COLUMNS, order=ORDER, left=set(), width=used - 1)[1] != hidden


def test_a_pipe_gets_every_column_on_one_line_a_row():
    output = io.StringIO()
    Session(False, output, io.StringIO()).show_table("t", COLUMNS, order=ORDER, left={"name"})
    (line,) = [line for line in output.getvalue().splitlines() if "n" * 34 in line]
    assert "w" * 70 in line and "91.1 M" in line


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (91_131_072, "91.1 M"),
        (521_411_104, "0.52 B"),
        (1_554_863_488, "1.55 B"),
        (33_642_000_000, "33.6 B"),
        (752_000, "0.75 M"),
        (9_400, "9.4 K"),
    ],
)
def test_parameters_have_enough_digits(number, text):
    assert parameters(number) == text
