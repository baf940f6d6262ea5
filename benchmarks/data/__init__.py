"""The data sets, behind one small interface: `load(name)` gives disjoint classes to train, validate and test."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .field import FIELD_SETS, class_folders, field_set, in_shop
from .glyphs import glyphs
from .scripts import SCRIPTS, script_set
from .splits import Images, LabelledImages, Splits, capped, fewer_classes, with_noise

IN_MEMORY = {"glyphs": glyphs}
FROM_FONTS: dict[str, Callable[[Path | None, Path], Splits]] = {name: partial(script_set, name) for name in SCRIPTS}
IN_FILES: dict[str, Callable[[Path, int], Splits]] = {
    **{name: partial(field_set, name) for name in FIELD_SETS},
    "inshop": in_shop,
    "folder": class_folders,
}
DEFAULT_ROOT = Path("data")

__all__ = [
    "FROM_FONTS",
    "IN_FILES",
    "IN_MEMORY",
    "Images",
    "LabelledImages",
    "Splits",
    "capped",
    "fewer_classes",
    "load",
    "with_noise",
]


def load(text: str, size: int = 224) -> Splits:
    """The data set of a name, or NAME:PATH: for one in files (default data/NAME), as crops of `size`, or a folder of fonts.

    Raises:
        ValueError: there is none of this name, or its files are not there; says what there is, or where to get them.
    """
    name, _, path = text.partition(":")
    if name in IN_MEMORY:
        return IN_MEMORY[name]()
    if name in FROM_FONTS:
        return FROM_FONTS[name](Path(path) if path else None, DEFAULT_ROOT)
    if name not in IN_FILES:
        known = ", ".join([*IN_MEMORY, *FROM_FONTS, *IN_FILES])
        raise ValueError(f"there is no data set {name!r}; there are: {known}")
    if name == "folder" and not path:
        raise ValueError("folder needs a path: --data folder:PATH")
    return IN_FILES[name](Path(path) if path else DEFAULT_ROOT / name, size)
