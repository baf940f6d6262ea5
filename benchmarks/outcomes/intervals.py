"""Means over seeds with 95% confidence intervals, and differences between methods that saw the same seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ..methods.contenders import BASELINE

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its confidence interval; NaN for that of a single value."""

    mean: float
    half: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside; never of a single value."""
        return abs(self.mean) > self.half


def interval(values: Any) -> Interval:
    """Student's t interval of the mean of independent values."""
    array = np.asarray(values, dtype=float)
    half = np.nan
    if len(array) > 1:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(half), len(array))


def test_values(document: dict[str, Any], metric: str = "map_at_r") -> pd.DataFrame:
    """A metric on the test classes: a row per seed, a column per title; NaN where a run is missing."""
    from .results import title_of

    runs = [run for run in document["runs"] if run["split"] == "test"]
    table = pd.DataFrame({"title": [title_of(run) for run in runs], "seed": [run["seed"] for run in runs]})
    table[metric] = [run[metric] for run in runs]
    return table.pivot(index="seed", columns="title", values=metric)


def with_interval(found: Interval, sign: str = "") -> str:
    """Per cent, with half the interval's width where there is one."""
    return f"{100 * found.mean:{sign}.1f}" + ("" if found.count < 2 else f" ± {100 * found.half:.1f}")


def differences(document: dict[str, Any], baseline: str = BASELINE) -> dict[str, Interval]:
    """MAP@R of each title less that of the baseline, paired by seed; empty without baseline or with a single seed."""
    values = test_values(document)
    if baseline not in values or len(values) < 2:
        return {}
    paired = {title: (values[title] - values[baseline]).dropna() for title in values if title != baseline}
    return {title: interval(gains) for title, gains in paired.items() if len(gains) > 1}
