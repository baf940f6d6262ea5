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
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from .splits import LabelledImages, Splits, split_by_class

FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
]
MIN_FONTS = 10
SIZE = 32  # pixels
FONT_SIZE = 22  # every letter of these fonts fits into 32 x 32 at this size

Rendering = tuple[int, bytes]  # font and pixels


def glyphs() -> Splits:
    """About 1,400 classes and 19,000 images of 32 x 32, grey, ink 1 on paper 0."""
    renderings = _render_letters()
    classes = _merge_homoglyphs(renderings)
    renderings_in_order: list[bytes] = []
    labels: list[int] = []
    for label, letters in enumerate(classes):
        # One sample a font: of letters that look the same, the first that the font has.
        by_font = {font: pixels for letter in reversed(letters) for font, pixels in renderings[letter]}
        renderings_in_order += by_font.values()
        labels += [label] * len(by_font)
    pixels = np.frombuffer(b"".join(renderings_in_order), dtype=np.uint8).reshape(-1, 1, SIZE, SIZE)
    names = [chr(letters[0]) for letters in classes]
    images = LabelledImages(torch.from_numpy(pixels / np.float32(255)), torch.tensor(labels))
    return split_by_class("glyphs", images, names)


def _render_letters() -> dict[int, list[Rendering]]:
    """Code point -> its renderings, for all letters that enough fonts contain."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts_of = defaultdict(list)
    for font, name in enumerate(FONTS):
        for code in FT2Font(str(folder / f"{name}.ttf")).get_charmap():
            if unicodedata.category(chr(code)).startswith("L"):
                fonts_of[code].append(font)
    # The basic layout needs no library beside Pillow, so that it renders the same everywhere.
    layout = ImageFont.Layout.BASIC
    typefaces = [ImageFont.truetype(str(folder / f"{name}.ttf"), FONT_SIZE, layout_engine=layout) for name in FONTS]
    return {
        code: [(font, _render(chr(code), typefaces[font])) for font in fonts]
        for code, fonts in sorted(fonts_of.items())
        if len(fonts) >= MIN_FONTS
    }


def _render(letter: str, typeface: ImageFont.FreeTypeFont) -> bytes:
    """The letter in the middle of the image."""
    image = Image.new("L", (SIZE, SIZE))
    left, top, right, bottom = typeface.getbbox(letter)
    position = ((SIZE - right - left) // 2, (SIZE - bottom - top) // 2)
    ImageDraw.Draw(image).text(position, letter, fill=255, font=typeface)
    return image.tobytes()


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
