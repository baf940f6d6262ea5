"""The data sets, behind one small interface: `load(name)` gives disjoint classes to train, validate and test."""

from __future__ import annotations

from .glyphs import glyphs
from .splits import LabelledImages, Splits

DATA_SETS = {"glyphs": glyphs}

__all__ = ["DATA_SETS", "LabelledImages", "Splits", "load"]


def load(name: str) -> Splits:
    """The data set of that name; a `ValueError` lists those that there are."""
    if name not in DATA_SETS:
        raise ValueError(f"there is no data set {name!r}; there are: {', '.join(DATA_SETS)}")
    return DATA_SETS[name]()
