"""Kanji and hangul: thousands of classes built of common parts, rendered from free fonts of different designers.

A class is a character that at least eight fonts contain, a sample is its rendering in one font.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from . import rendering
from .fonts import HANGUL_FONTS, KANJI_FONTS, fonts_in, packaged_fonts
from .rendering import as_images, legible, render_characters
from .splits import LabelledImages, Splits, some_of_each, split_by_class

MIN_FONTS = 8
MIN_CLASSES = 4  # some for each part of the split
# Of each class that is validated or tested on: of all classes, since the near ones make the difference, but not of all
# fonts, since a test of 150,000 images takes longer than the training.
VALIDATION_SAMPLES = 6
TEST_SAMPLES = 8


@dataclass(frozen=True)
class Script:
    """Characters, the Debian packages with fonts of them, and the size at which those fit into the image."""

    characters: frozenset[int]
    packages: dict[str, str]
    font_size: int


def jis_x_0208_kanji() -> frozenset[int]:
    """The 6,355 kanji of levels 1 and 2, which are rows 16 to 84 of the standard."""
    rows, cells = range(16, 85), range(1, 95)
    table = (bytes((0xA0 + row, 0xA0 + cell)).decode("euc_jp", errors="ignore") for row in rows for cell in cells)
    return frozenset(ord(character) for character in table if len(character) == 1)  # the rows are not full


SCRIPTS = {
    "kanji": Script(jis_x_0208_kanji(), KANJI_FONTS, 28),
    "hangul": Script(frozenset(range(0xAC00, 0xD7A4)), HANGUL_FONTS, 24),  # all 11,172 syllables
}


def script_set(name: str, folder: Path | None, cache: Path) -> Splits:
    """One of `SCRIPTS` by the fonts of the system or of a folder, 32 x 32, grey, ink 1 on paper 0.

    Rendered images are kept in the folder `cache`, in a file for these characters and fonts.

    Raises:
        ValueError: fonts are missing, or have too few of these characters; says what to do.
    """
    script = SCRIPTS[name]
    fonts = packaged_fonts(name, script.packages) if folder is None else fonts_in(folder)
    images, codes = cached_characters(script.characters, fonts, script.font_size, cache / name)
    splits = split_by_class(name if folder is None else f"{name}:{folder}", images, [chr(code) for code in codes])
    return replace(splits, val=some_of_each(splits.val, VALIDATION_SAMPLES), test=some_of_each(splits.test, TEST_SAMPLES))


def cached_characters(
    characters: frozenset[int], fonts: list[Path], font_size: int, stem: Path
) -> tuple[LabelledImages, list[int]]:
    """Images of characters in fonts, labelled by their place in the list of those characters that are classes.

    They are read from, or else written to, a file `stem`-DIGEST.pt, which other fonts (by name and length), characters or
    ways of rendering give another name.

    Raises:
        ValueError: too few characters are in enough of the fonts.
    """
    known_fonts = [(font.name, font.stat().st_size) for font in fonts]
    made_of = repr((sorted(characters), known_fonts, font_size, MIN_FONTS, Path(rendering.__file__).read_bytes()))
    file = stem.with_name(f"{stem.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.pt")
    if not file.exists():
        renderings = legible(render_characters(fonts, font_size, characters.__contains__, MIN_FONTS), MIN_FONTS)
        if len(renderings) < MIN_CLASSES:
            raise ValueError(
                f"a comparison needs at least {MIN_CLASSES} characters of {stem.name} that {MIN_FONTS} fonts tell apart "
                f"from all others, but the {len(fonts)} fonts given have {len(renderings)}: add fonts, or take those of "
                f"the system by --data {stem.name}"
            )
        images = as_images(list(renderings.values()))
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as folder:  # whole or not at all, whatever other processes do
            torch.save(
                {"images": images.images, "labels": images.labels, "codes": list(renderings)}, Path(folder, file.name)
            )
            os.replace(Path(folder, file.name), file)
    kept = torch.load(file, weights_only=True, mmap=True)
    return LabelledImages(kept["images"], kept["labels"]), kept["codes"]
