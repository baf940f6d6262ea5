"""The table of a comparison, for the terminal and for the README."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from . import study
from .intervals import BASELINE, Interval, differences, interval, test_values
from .results import summarize
from .speed import report

BEHIND = ("R-Prec.", "val.", "train", "refresh")


def columns(document: dict[str, Any]) -> tuple[str, ...]:
    """The heads of the table; with recalls these instead of P@1, which is the first of them."""
    paired = [f"vs {BASELINE}"] if differences(document) else []
    return "method", "MAP@R", *paired, *(recalls_of(document) or ["P@1"]), *BEHIND


def recalls_of(document: dict[str, Any]) -> list[str]:
    return [f"R@{k}" for k in document["runs"][0].get("recall", {})]


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table, sorted by test MAP@R; accuracies in per cent, seconds per run."""
    paired, values = differences(document), test_values(document)
    return [
        (
            row["title"],
            with_interval(interval(values[row["title"]].dropna())),
            *([with_interval(paired[row["title"]], sign="+") if row["title"] in paired else "-"] if paired else []),
            *(percent(row[name]) for name in recalls_of(document) or ["precision_at_1"]),
            percent(row["r_precision"]),
            percent(row["validation"]),
            f"{row['train_seconds']:.0f} s",
            f"{row['refresh_seconds']:.0f} s" if row["refresh_seconds"] else "-",
        )
        for row in summarize(document).to_dict("records")
    ]


def with_interval(found: Interval, sign: str = "") -> str:
    """Per cent, with half the interval's width where there is one."""
    return f"{100 * found.mean:{sign}.1f}" + ("" if found.count < 2 else f" ± {100 * found.half:.1f}")


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def caption(document: dict[str, Any]) -> str:
    """What the numbers are of."""
    summary, data = summarize(document), document["metadata"]["data"]
    seeds = f"mean of {summary.seeds.max()} seeds ± half its 95% interval" if summary.seeds.max() > 1 else "one seed"
    paired = f"; vs {BASELINE}: difference, seed by seed" if differences(document) else ""
    batch = document["metadata"]["plan"]["batch_size"]
    training = f"{summary.iterations[0]} iterations of batch {batch}, {seeds}"
    classes = f"{data['name']}, {data['test_classes']} unseen classes"
    return f"{classes}, {training}; per cent; val.: MAP@R of the validation classes{paired}"


def rich_table(document: dict[str, Any]) -> Table:
    """For the terminal; the best is in bold."""
    heads, cells_of_rows, title = contents(document)
    style = {"title_justify": "left", "title_style": "italic", "header_style": "bold"}
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **style)  # as narrow as can be, for 80 columns
    for number, head in enumerate(heads):
        # Where it gets narrow, long titles break and numbers do not.
        number_like = is_number(number, heads)
        width = None if number else 20
        justify = "right" if number_like else "left"
        table.add_column(head, justify=justify, no_wrap=number_like, overflow="fold", min_width=width)
    for number, cells in enumerate(cells_of_rows):
        table.add_row(*(cell.replace(" ± ", "±") for cell in cells), style="bold" if number == 0 else None)
    return table


def markdown_table(document: dict[str, Any]) -> str:
    """For the README: of a comparison, a tuning or the speed benchmark."""
    if "measurements" in document:
        return report.markdown_table(document)
    heads, cells_of_rows, title = contents(document)
    rule = tuple("---:" if is_number(number, heads) else "---" for number in range(len(heads)))
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *cells_of_rows)]
    return "\n".join(lines) + f"\n\n{title}\n"


def contents(document: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, cells and caption."""
    if "studies" in document:
        return study.COLUMNS, study.rows(document), study.caption(document)
    return columns(document), rows(document), caption(document)


def is_number(number: int, heads: tuple[str, ...]) -> bool:
    return number > 0 and not heads[number].startswith("settings")
