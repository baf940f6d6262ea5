"""What all commands share: the program, its console, and how errors end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
console = Console()


@contextmanager
def explained_errors() -> Iterator[None]:
    """What the user can mend ends in a line, not in a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def spread_lists(arguments: list[str]) -> list[str]:
    """`--seeds 0 1 2` as `--seeds 0 --seeds 1 --seeds 2`, the way the command-line library reads lists."""
    spread: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.partition("=")[0]
            option = name if name in ("--methods", "--seeds", "--parts") else None
            spread.append(argument)
        elif option and spread[-1] != option:
            spread += [option, argument]
        else:
            spread.append(argument)
    return spread
