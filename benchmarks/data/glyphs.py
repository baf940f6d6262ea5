"""Glyphs: Unicode letters rendered from the fonts that matplotlib ships. No download, real visual neighbourhoods.

A class is a letter (e, é, ê, ё, ...) that at least ten of sixteen fonts contain, a sample is its rendering in one font.
Letters that render identically in some font (Latin A, Greek Α, Cyrillic А) cannot be told apart and are one class.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import scipy.sparse as sparse

from .rendering import Rendering, as_images, render_characters
from .splits import Splits, split_by_class

FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
]
MIN_FONTS = 10
FONT_SIZE = 22  # every letter of these fonts fits into 32 x 32 at this size


def glyphs() -> Splits:
    """About 1,400 classes and 19,000 images of 32 x 32, grey, ink 1 on paper 0."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    renderings = render_characters([folder / f"{name}.ttf" for name in FONTS], FONT_SIZE, _is_letter, MIN_FONTS)
    classes = _merge_homoglyphs(renderings)
    # One sample a font: of letters that look the same, the first that the font has.
    by_font = [{font: pixels for letter in reversed(letters) for font, pixels in renderings[letter]} for letters in classes]
    images = as_images([pixels.values() for pixels in by_font])
    return split_by_class("glyphs", images, [chr(letters[0]) for letters in classes])


def _is_letter(code: int) -> bool:
    return unicodedata.category(chr(code)).startswith("L")


def _merge_homoglyphs(renderings: dict[int, list[Rendering]]) -> list[list[int]]:
    """Groups of letters of which each looks like another of its group in some font, in the order of code points."""
    codes = list(renderings)
    first_with: dict[Rendering, int] = {}
    pairs = [
        (first_with.setdefault(rendering, place), place)
        for place, code in enumerate(codes)
        for rendering in renderings[code]
    ]
    rows, columns = np.array(pairs).T
    graph = sparse.coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(codes), len(codes)))
    group_of = sparse.csgraph.connected_components(graph, directed=False)[1]
    groups = defaultdict(list)
    for code, group in zip(codes, group_of, strict=True):
        groups[group].append(code)
    return sorted(groups.values())
