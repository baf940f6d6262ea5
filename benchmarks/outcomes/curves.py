"""Validation curves: the mean of a method's seeds, and the band from the worst to the best of them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from .results import title_of

AXES = {"iterations": "iterations", "seconds": "seconds of training and refreshing"}  # what a curve is over -> in words


def mean_curves(document: dict[str, Any], over: str = "iterations") -> pd.DataFrame:
    """A row per title and evaluation: title, step, at, mean, low, high. Curves without such points are left out.

    `at` is a mean as well: seeds take different seconds to the same step.

    Raises:
        ValueError: `over` is neither "iterations" nor "seconds".
    """
    if over not in AXES:
        raise ValueError(f"a curve is over {' or '.join(AXES)}, not {over!r}")
    points = pd.DataFrame(
        [
            (title_of(curve), step, at, value)
            for curve in document["curves"]
            if over in curve
            for step, (at, value) in enumerate(zip(curve[over], curve["map_at_r"], strict=True))
        ],
        columns=["title", "step", "at", "map_at_r"],
    )
    steps = points.groupby(["title", "step"], as_index=False)
    return steps.agg(at=("at", "mean"), mean=("map_at_r", "mean"), low=("map_at_r", "min"), high=("map_at_r", "max"))
