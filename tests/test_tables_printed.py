"""Tables in the terminal: nothing is left out where there is little room."""

import io
import re

import pytest
from rich.console import Console

from benchmarks.common.printing import print_table
from benchmarks.outcomes.tables import narrow_table

HEADS = ("method", "MAP@R", "R@1", "R@10", "R@100", "R@1000", "R-Prec.", "val.", "train", "refresh")
TITLE = "a data set with a long name, 24 unseen classes, 60 iterations at batch size 64, one seed, in per cent"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 300])
def test_every_cell_and_every_word_is_there(width):
    numbers = [[f"{row}{column}.0" for column in range(10, 19)] for row in range(10, 13)]
    rows = [("multi-similarity-sampling:alpha=2", *cells) for cells in numbers]
    console = Console(width=width, file=io.StringIO())
    print_table(console, narrow_table(HEADS, rows, TITLE))
    text = console.file.getvalue()
    assert re.sub(r"\s+", " ", text).startswith(TITLE)
    for cells in (HEADS, *numbers):
        assert all(cell in text for cell in cells)
    assert "".join(re.findall(r"^ ?(\S+)", text, re.MULTILINE)).count("similarity") == len(rows)
    assert max(map(len, text.splitlines())) <= max(width, 100)
