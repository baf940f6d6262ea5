"""The commands that show: `methods`, `table`, `plot` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..methods.contenders import METHODS
from ..outcomes import results
from ..outcomes.plots import plot_curves
from ..outcomes.tables import markdown_table, markdown_view
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
            help="All files in one table: the questions that `ablate` answered (ablations), what anchor-neighbour sampling "
            "brings each loss (sampling) and whether the first tree tells (nearness), or whether methods stand in the same "
            "order (order), or how many classes that were split in two the tree finds (twins)."
        ),
    ] = None,
) -> None:
    """Print a results file as a Markdown table."""
    with explained_errors():
        documents = {str(file): results.load(file) for file in files}
        if methods:
            documents = {name: results.only(document, methods) for name, document in documents.items()}
        if view is not None:
            print(markdown_view(view, documents), end="")
            return
        for document in documents.values():
            print(markdown_table(document), end="")


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A results file of a comparison.")],
    output: Annotated[Path, typer.Argument(help="The picture, PNG or SVG.")],
    methods: Annotated[list[str] | None, typer.Option(help="Only these, by their titles.")] = None,
) -> None:
    """Draw validation MAP@R over iterations of a results file."""
    with explained_errors():
        document = results.load(file)
        if "curves" not in document:
            raise ValueError("plot is of comparisons, and this file is of something else")
        if output.suffix not in (".png", ".svg"):
            raise ValueError(f"the picture should be a .png or .svg, but it is {output}")
        plot_curves(results.only(document, methods) if methods else document, output)
    console.print(f"Written: {output}", highlight=False)


@app.command("report")
def make_report(
    files: Annotated[list[Path], typer.Argument(help="Results files, and class_tree.json of a comparison.")],
    output: Annotated[Path, typer.Option(help="The page, and the same as Markdown beside it.")] = Path("runs/report.html"),
) -> None:
    """Make one page of results files that opens offline: ranking, curves, cost, and an explorer of a trained class tree."""
    with explained_errors():
        try:
            from ..report import page
        except ImportError as error:
            raise ValueError(f'report needs {error.name}: pip install ".[benchmarks]"') from error
        documents, trees = page.read(files)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page.html(documents, trees), encoding="utf-8")
        output.with_suffix(".md").write_text(page.markdown(documents), encoding="utf-8")
    console.print(f"Written: {output}, {output.with_suffix('.md')}", highlight=False)
