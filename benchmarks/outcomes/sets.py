"""The same methods on several data sets, side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..methods.contenders import BASELINE
from .intervals import Interval, differences, test_values, with_interval
from .results import title_of
from .sampling import in_columns, iterations_of, training_set


def sets_table(documents: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, cells and caption: a row for each method, a column for each plan and data set.

    First the methods that most columns have.
    """
    columns = in_columns(documents, lambda document: {title_of(run) for run in document["runs"]})
    documents = [{**column[0], "runs": [run for one in column for run in one["runs"]]} for column in columns]
    by_column = [(test_values(document), differences(document)) for document in documents]
    means: dict[str, list[float]] = {}
    for values, _ in by_column:
        for title, mean in values.mean().items():
            means.setdefault(str(title), []).append(float(mean))
    titles = sorted(means, key=lambda title: (-len(means[title]), -float(np.mean(means[title]))))
    lengths = [iterations_of(document) for document in documents]
    seeds = [f"{values.count().max()} seeds" for values, _ in by_column]
    shared = [parts[0] for parts in (lengths, seeds) if len(set(parts)) == 1]  # need not stand in every column
    heads = [
        ", ".join([training_set(document), *(part for part in parts if part not in shared)])
        for document, *parts in zip(documents, lengths, seeds, strict=True)
    ]
    of_all = f" ({', '.join(shared)})" if shared else ""
    return (
        ("method", *heads),
        [(title, *(_cell(title, values, behind) for values, behind in by_column)) for title in titles],
        f"test MAP@R in per cent, mean over the seeds{of_all}; in brackets: less that of "
        f"{BASELINE}, paired over the seeds, ± half the width of the 95% confidence interval",
    )


def _cell(title: str, values: pd.DataFrame, behind: dict[str, Interval]) -> str:
    """The mean, how far it is from the baseline's, and how many seeds it is of, where others have more."""
    if title not in values:
        return "-"
    own = values[title]
    difference = f" ({with_interval(behind[title], sign='+')})" if title in behind else ""
    seeds = f", of {own.count()}" if own.count() < len(values) else ""
    return f"{100 * own.mean():.1f}{difference}{seeds}"
