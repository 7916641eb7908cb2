"""Tables in a terminal and in a pipe: whose row it is, and every digit, at any width."""

import io

import pytest
from rich.console import Console

from tnt_jax.commands.tables import print_rows

ROWS = [
    {
        "model": f"runs/a rather long name of a run[red]/seed={seed}",
        "weights": weights,
        "data": "csv:photographs/clean.csv",
        "split": "test",
        "images": "360",
        "top-1": "34.72 (29.99 to 39.78)",
        "top-5": "87.22 (83.38 to 90.28)",
        "balanced accuracy": "34.83 (30.30 to 38.88)",
        "macro F1": "28.70 (24.10 to 32.60)",
        "ECE": "14.72",
        "loss": "1.9484",
        "images/s": "3,844",
    }
    for seed in (0, 1)
    for weights in ("averaged", "raw")
]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("count", [1, 4])
def test_no_name_and_no_digit_is_lost(width, count):
    console = Console(width=width, file=io.StringIO())
    print_rows(console, ROWS[:count], title="[bold]", caption="in percent")
    printed = console.file.getvalue()
    assert all(len(line) <= width for line in printed.splitlines())
    assert "[bold]" in printed
    for row in ROWS[:count]:
        assert all(name in printed for name in row)
        cells = [row[name] for name in row if name not in ("model", "data")]
        for part in "\n".join(cells).replace(" (", "\n(").splitlines():
            assert printed.count(part) >= sum(part in " ".join(each.values()) for each in ROWS[:count]), part
    # Long names are broken into lines, and none of their letters is left out.
    letters = "".join(printed.split())
    assert letters.count("[red]") == letters.count("csv:") == count


def test_a_table_that_fits_has_a_line_for_each_row():
    console = Console(width=80, file=io.StringIO())
    print_rows(console, [{"class": name, "images": "12", "recall": "50.00 (25.38 to 74.62)"} for name in "abc"])
    assert len(console.file.getvalue().splitlines()) == 2 + 2 * 3 + 1 + 1
