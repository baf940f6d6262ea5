"""The commands that show: `methods`, `table`, `plot` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..methods.contenders import METHODS
from ..outcomes import results
from ..outcomes.plots import plot_curves, plot_retrievals
from ..outcomes.tables import markdown_table, markdown_view
from ..report import retrievals
from .app import app, console, explained_errors


@app.command("methods")
def list_methods() -> None:
    """List the methods and their settings."""
    for method in METHODS.values():
        settings = ",".join(f"{name}={value}" for name, value in method.defaults.items())
        console.print(f"[bold]{method.name}[/]: {method.description}\n  [dim]{settings}[/]", highlight=False)


@app.command()
def table(
    files: Annotated[list[Path], typer.Argument(help="A results file, or several with --view.")],
    methods: Annotated[list[str] | None, typer.Option(help="Only the rows of these, by their titles.")] = None,
    view: Annotated[
        str | None,
        typer.Option(
            help="All files in one table: the questions that `ablate` answered (ablations), the methods set by set (sets), "
            "what anchor-neighbour sampling brings each loss (sampling) and what tells it before the test (nearness), if "
            "methods stand in the same order (order), or how many classes that were split in two the tree finds (twins)."
        ),
    ] = None,
) -> None:
    """Print a results file as a Markdown table."""
    with explained_errors():
        documents = {str(file): results.load(file) for file in files}
        if methods:
            documents = results.only_in_any(documents, methods)
        if view is not None:
            print(markdown_view(view, documents), end="")
            return
        for document in documents.values():
            print(markdown_table(document), end="")


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A results file of a comparison, or its retrievals.json.")],
    output: Annotated[Path, typer.Argument(help="The picture, PNG or SVG.")],
    methods: Annotated[list[str] | None, typer.Option(help="Only these, by their titles.")] = None,
    queries: Annotated[int, typer.Option(help="Of retrievals.", min=2)] = 4,
    over: Annotated[str, typer.Option(help="Of curves: iterations, or seconds of training and refreshing.")] = "iterations",
) -> None:
    """Draw the validation MAP@R of a results file as curves, or the images that are nearest to some queries."""
    with explained_errors():
        if output.suffix not in (".png", ".svg"):
            raise ValueError(f"the picture should be a .png or .svg, but it is {output}")
        found = retrievals.load(file)
        if found is not None:
            plot_retrievals(retrievals.only(found, methods) if methods else found, output, queries)
        else:
            document = results.load(file)
            if "curves" not in document:
                raise ValueError("plot is of comparisons and of their retrievals, and this file is of something else")
            plot_curves(results.only(document, methods) if methods else document, output, over)
    console.print(f"Written: {output}", highlight=False)


@app.command("report")
def make_report(
    files: Annotated[
        list[Path], typer.Argument(help="Results files, and class_tree.json and retrievals.json of a comparison.")
    ],
    output: Annotated[Path, typer.Option(help="The page, and the same as Markdown beside it.")] = Path("runs/report.html"),
) -> None:
    """Make one page that opens offline: ranking, curves, cost, retrievals, a map, and an explorer of a trained class tree.

    `compare` ends with it.
    """
    with explained_errors():
        try:
            from ..report.writing import write_report
        except ImportError as error:
            raise ValueError(f'report needs {error.name}: pip install ".[benchmarks]"') from error
        write_report(files, output)
    console.print(f"Written: {output}, {output.with_suffix('.md')}", highlight=False)
