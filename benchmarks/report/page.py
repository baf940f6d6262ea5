"""The report as one HTML page, and as Markdown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..methods.contenders import BASELINE
from ..outcomes import intervals, results, tables, timings
from . import charts, explorer, retrievals
from .rendering import rendered

# The two halves of HTL, alone and together: margins by rows, samplers by columns.
TWO_BY_TWO = [
    ("constant margin, TripletMarginLoss", "triplet", "triplet-sampling"),
    ("constant margin, smooth maximum", None, "htl-constant"),
    ("the tree's margin, smooth maximum", "htl-margin", "htl"),
]
REACHED = "triplet"  # whose final accuracy the others are timed to


@dataclass(frozen=True)
class Files:
    """What a report is made of."""

    documents: list[tuple[str, dict[str, Any]]]  # results files with their names
    trees: list[dict[str, Any]]  # see explorer.py
    retrievals: list[dict[str, Any]]  # see retrievals.py


def read(paths: list[Path]) -> Files:
    """Results files, class trees and retrievals.

    Raises:
        ValueError: a file is none of these.
    """
    files = Files([], [], [])
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no results file, class tree or retrievals: {error}") from error
        if isinstance(content, dict) and "merges" in content:
            explorer.validate(content)
            files.trees.append(content)
        elif isinstance(content, dict) and "queries" in content:
            retrievals.validate(content)
            files.retrievals.append(content)
        else:
            files.documents.append((path.stem, results.load(path)))
    return files


def html(files: Files) -> str:
    """The page; everything that it needs is in it."""
    return rendered(
        "page.html",
        sections=[section(name, document) for name, document in files.documents],
        trees=[in_script(tree) for tree in files.trees],
        retrievals=[(gallery(document), in_script(document)) for document in files.retrievals],
    )


def in_script(document: dict[str, Any]) -> Markup:
    """As JSON in a script; "<" would end it early."""
    return Markup(json.dumps(document, ensure_ascii=False).replace("<", "\\u003c"))


def gallery(document: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of retrievals, query by query; pictures by their places, as the script puts them in."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for query in document["queries"]:
        rows = []
        for method in document["methods"]:
            neighbors = [
                {"picture": place, "right": bool(right), "name": document["pictures"][place][1]}
                for place, right in query["neighbors"][method]
            ]
            rows.append((method, sum(neighbor["right"] for neighbor in neighbors), neighbors))
        name = document["pictures"][query["picture"]][1]
        fewest, most = min(right for _, right, _ in rows), max(right for _, right, _ in rows)
        right = f"{fewest} right" if fewest == most else f"{fewest} to {most} right"
        kinds.setdefault(query["kind"], []).append(
            {"picture": query["picture"], "name": name, "right": f"{right} of {len(rows[0][2])}", "rows": rows}
        )
    count = max(len(neighbors) for queries in kinds.values() for query in queries for _, _, neighbors in query["rows"])
    return {"title": f"{document['data']}, {document['title']}", "queries": list(kinds.items()), "neighbors": count}


def section(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a file."""
    heads, rows, caption = contents(document)
    shown = {
        "name": name, "heads": heads, "rows": rows, "caption": caption, "pictures": [], "words": [], "two_by_two": [],
        "times": [], "metadata": metadata(document),
    }  # fmt: skip
    if "runs" not in document:
        return shown
    pictures = [
        ("Ranking", charts.ranking(document)),
        ("Accuracy over iterations", charts.curves(document, "iterations")),
        ("Accuracy over seconds", charts.curves(document, "seconds")),
        ("Cost", charts.cost(document)),
    ]
    shown["pictures"] = [(title, Markup(svg)) for title, svg in pictures if svg]
    shown["words"] = in_words(document)
    shown["two_by_two"] = two_by_two(document)
    shown["times"] = times_to_reach(document)
    return shown


def contents(document: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, rows and caption of the table of any of our files."""
    if "measurements" in document:
        return timings.COLUMNS, timings.rows(document), timings.caption(document)
    return tables.contents(document)


def in_words(document: dict[str, Any]) -> list[str]:
    """Which methods are ahead of htl, which behind, and which cannot be told from it."""
    paired = intervals.differences(document)
    groups: dict[str, list[str]] = {"Ahead of": [], "Behind": [], "Not to be told from": []}
    for title, gain in sorted(paired.items(), key=lambda item: -item[1].mean):
        group = "Not to be told from" if not gain.excludes_zero else ("Ahead of" if gain.mean > 0 else "Behind")
        groups[group].append(f"{title} ({intervals.with_interval(gain, sign='+')})")
    return [f"{group} {BASELINE}, seed by seed: {', '.join(titles)}." for group, titles in groups.items() if titles]


def two_by_two(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Margins by samplers: test MAP@R in per cent; empty unless both halves and the whole are there."""
    values = intervals.test_values(document)
    if not {"triplet", "triplet-sampling", "htl-margin", "htl"} <= set(values):
        return []

    def cell(title: str | None) -> str:
        return intervals.with_interval(intervals.interval(values[title].dropna())) if title in values else "-"

    return [(name, cell(alone), cell(together)) for name, alone, together in TWO_BY_TWO if together in values]


def times_to_reach(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """When the mean validation curve of each method first reaches the end of that of `triplet`: iterations and seconds."""
    by_title: dict[str, list[dict[str, Any]]] = {}
    for curve in document["curves"]:
        by_title.setdefault(results.title_of(curve), []).append(curve)
    if REACHED not in by_title:
        return []

    def mean(curves: list[dict[str, Any]], name: str) -> list[float]:
        return [sum(values) / len(values) for values in zip(*(curve[name] for curve in curves), strict=True)]

    goal = mean(by_title[REACHED], "map_at_r")[-1]
    found = []
    for title, curves in by_title.items():
        step = next((place for place, value in enumerate(mean(curves, "map_at_r")) if value >= goal), None)
        if step is None:
            found.append((float("inf"), title, "not reached", "-"))
            continue
        seconds = mean(curves, "seconds")[step] if all("seconds" in curve for curve in curves) else None
        iterations = curves[0]["iterations"][step]
        found.append(
            (
                iterations if seconds is None else seconds,
                title,
                str(iterations),
                "-" if seconds is None else f"{seconds:.0f} s",
            )
        )
    return [(title, iterations, seconds) for _, title, iterations, seconds in sorted(found)]


def metadata(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the numbers come from."""
    entries = document["metadata"]
    commit = entries["commit"]
    shown = {
        "command": entries["command"],
        "commit": commit.replace("-dirty", " with changes that were not committed"),
        "date": entries["date"],
        "threads": entries.get("threads"),
        "device": ", ".join(f"{name} {value}" for name, value in entries["device"].items()),
        "versions": ", ".join(f"{name} {version}" for name, version in entries["versions"].items()),
        "plan": ", ".join(f"{name} {value}" for name, value in entries.get("plan", {}).items()),
        "data": ", ".join(f"{name} {value}" for name, value in entries.get("data", {}).items()),
    }
    return [(name, str(value)) for name, value in shown.items() if value]


def markdown(files: Files) -> str:
    """The tables and words of the page."""
    parts = []
    for name, document in files.documents:
        shown = section(name, document) if "runs" in document else {"words": [], "two_by_two": [], "times": []}
        parts += [f"## {name}\n", tables.markdown_table(document)]
        parts += [f"- {sentence}" for sentence in shown["words"]] + [""] * bool(shown["words"])
        for heads, rows in (
            (("margin", "MPerClassSampler", "A-N sampling"), shown["two_by_two"]),
            ((f"to the final accuracy of {REACHED}", "iterations", "seconds"), shown["times"]),
        ):
            if rows:
                lines = [heads, ("---", "---:", "---:"), *rows]
                parts += ["| " + " | ".join(cells) + " |" for cells in lines] + [""]
    return "\n".join(parts)
