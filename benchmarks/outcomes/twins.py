"""How many of the classes that are two by mistake the tree finds among its most confusable pairs, and how purely."""

from __future__ import annotations

from typing import Any

import numpy as np

from .intervals import interval, with_interval
from .results import title_of

PRECISIONS = (0.9, 0.7, 0.5)


def recall_at(precision: float, ranks: list[int], num_twins: int) -> float:
    """The largest share of the twins in a head of the list of pairs of which at least so large a share are twins.

    Args:
        ranks: of the twins in the list: 1, 2, ..., ascending; of those that are not in it, none.
    """
    found = np.arange(1, len(ranks) + 1)
    pure = found[found / np.asarray(ranks, dtype=float) >= precision] if ranks else found
    return float(pure.max() / num_twins) if len(pure) else 0.0


def twin_table(documents: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, cells and caption: a row for each contender and refresh, means over the seeds."""
    rows: list[tuple[str, ...]] = []
    for document in documents:
        curves = [curve for curve in document["curves"] if "twins" in curve.get("nearness", {})]
        for title in dict.fromkeys(map(title_of, curves)):
            num_twins = twins_of(document)
            runs = [curve["nearness"]["twins"] for curve in curves if title_of(curve) == title]
            for refreshes in zip(*runs, strict=False):  # the same iterations in every seed
                recalls = [[recall_at(p, ranks, num_twins) for _, ranks in refreshes] for p in PRECISIONS]
                rows.append((title, f"{refreshes[0][0]:,}", *(with_interval(interval(values)) for values in recalls)))
    return (
        ("method", "iterations", *(f"at precision {precision}" for precision in PRECISIONS)),
        rows,
        "per cent of the classes that were split in two whose halves stand in the head of `ClassTree.confusable`, where so "
        "large a share of that head is such pairs; mean over the seeds ± half the width of the 95% confidence interval",
    )


def twins_of(document: dict[str, Any]) -> int:
    """How many classes were split: the training classes are so many more."""
    share, total = document["metadata"]["plan"]["split_classes"], document["metadata"]["data"]["train_classes"]
    return next(total - whole for whole in range(total + 1) if whole + round(share * whole) == total)
