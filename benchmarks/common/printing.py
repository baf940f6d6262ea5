"""Tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_table(console: Console, table: Table) -> None:
    """All of it: rich leaves out columns, and words of the title, where there is no room; here the terminal breaks lines.

    Only the first column gets narrower, down to its `min_width`.
    """
    first, unbounded = table.columns[0], console.options.update(max_width=10_000)
    first.max_width = first.min_width
    needed = console.measure(table, options=unbounded).minimum
    first.max_width = None
    wanted = console.measure(table, options=unbounded).maximum
    table.width = max(needed, min(wanted, console.width))
    console.print(table, crop=False)
