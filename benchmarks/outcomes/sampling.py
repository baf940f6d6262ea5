"""What anchor-neighbour sampling brings to each loss on each data set, and the order of methods in two files."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from .intervals import Interval, interval, test_values, with_interval
from .results import title_of

SUFFIX = "-sampling"  # of a method's name: the same loss with our sampler
SAME = {"htl-margin": "htl"}  # the pair that is named in another way


def pairs(document: dict[str, Any]) -> dict[str, str]:
    """The title of a contender with PML's sampler -> of the same one with ours, by their names or by their settings."""
    settings = {title_of(run): {"method": run["method"], **run["settings"]} for run in document["runs"]}
    found = {}
    for title, own in settings.items():
        named = SAME.get(title, title + SUFFIX)
        same = [other for other, its in settings.items() if its == {**own, "sampling": "neighbors"}]
        if own["sampling"] == "per-class" and (named in settings or same):
            found[title] = named if named in settings else same[0]
    return found


def gains(document: dict[str, Any]) -> dict[str, Interval]:
    """Test MAP@R with our sampler less that with PML's, paired by seed, by the title of the latter."""
    values = test_values(document)
    return {own: interval((values[other] - values[own]).dropna()) for own, other in pairs(document).items()}


def training_set(document: dict[str, Any]) -> str:
    """The data set and how much of it, in short."""
    plan, data = document["metadata"]["plan"], document["metadata"]["data"]
    noise = [f"{name.replace('_', ' ')} {plan[name]}" for name in ("split_classes", "wrong_labels") if name in plan]
    samples = f"{data['train_images'] / data['train_classes']:.0f} samples"
    return ", ".join([data["name"], f"{data['train_classes']:,} classes", samples, *noise])


def iterations_of(document: dict[str, Any]) -> str:
    return f"{document['metadata']['plan']['iterations']:,} iterations"


def what_of(document: dict[str, Any]) -> str:
    """On what and for how long it was trained."""
    return f"{training_set(document)}, {iterations_of(document)}"


def in_columns(documents: list[dict[str, Any]], titles: Callable[[dict[str, Any]], set[str]]) -> list[list[dict[str, Any]]]:
    """The files of one plan and data set together, unless they have a title in common: a column for each."""
    conditions = itemgetter("plan", "data")
    columns: list[list[dict[str, Any]]] = []
    for document in documents:
        for column in columns:
            known = {title for one in column for title in titles(one)}
            alike = conditions(column[0]["metadata"]) == conditions(document["metadata"])
            if alike and known.isdisjoint(titles(document)):
                column.append(document)
                break
        else:
            columns.append([document])
    return columns


def gain_table(documents: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, cells and caption: a row for each loss, a column for each plan and data set."""
    columns = in_columns(documents, lambda document: {*gains(document)})
    by_column = [{title: gain for one in column for title, gain in gains(one).items()} for column in columns]
    titles = sorted({title for found in by_column for title in found}, key=lambda title: -mean_of(by_column, title))
    rows = [
        (title, *(with_interval(found[title], sign="+") if title in found else "-" for found in by_column))
        for title in titles
    ]
    return (
        ("method", *(what_of(column[0]) for column in columns)),
        rows,
        "test MAP@R with anchor-neighbour sampling less that with MPerClassSampler, paired over the seeds, ± half the width "
        "of the 95% confidence interval, in points of per cent",
    )


def mean_of(by_column: list[dict[str, Interval]], title: str) -> float:
    return float(np.mean([found[title].mean for found in by_column if title in found]))


def order_table(documents: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, cells and caption: how well the order of the methods in one file is that in another."""
    values = {name: method_values(document) for name, document in documents.items()}
    rows: list[tuple[str, ...]] = []
    for number, (name, own) in enumerate(values.items()):
        for other_name, other in list(values.items())[number + 1 :]:
            shared = [title for title in own if title in other]
            order = stats.spearmanr([own[title] for title in shared], [other[title] for title in shared]).statistic
            rows.append((Path(name).stem, Path(other_name).stem, str(len(shared)), f"{order:.2f}"))
    return ("order by", "order by this", "methods", "rank correlation"), rows, "Spearman's rank correlation"


def method_values(document: dict[str, Any]) -> dict[str, float]:
    """By method: test MAP@R, mean over the seeds; of a tuning, the validation MAP@R of the best trial."""
    if "studies" in document:
        return {method: max(trial["mean"] for trial in trials) for method, trials in document["studies"].items()}
    return {str(title): float(mean) for title, mean in test_values(document).mean().items()}
