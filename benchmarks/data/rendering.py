"""Characters as small grey images, each in many fonts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from .splits import LabelledImages

SIZE = 32  # pixels
BLANK = bytes(SIZE * SIZE)

Rendering = tuple[int, bytes]  # font and pixels


def render_characters(
    fonts: Sequence[Path], font_size: int, is_wanted: Callable[[int], bool], min_fonts: int
) -> dict[int, list[Rendering]]:
    """Code point -> its renderings, in the order of code points and of fonts: of those wanted that enough fonts contain.

    A font contains what its table of characters says, even if that leads to a blank or a box. Of a collection (.ttc) the
    first font counts.

    Raises:
        ValueError: a file is no font; names it.
    """
    # The basic layout needs no library beside Pillow, so that it renders the same everywhere.
    layout = ImageFont.Layout.BASIC
    typefaces = []
    fonts_of = defaultdict(list)
    for font, path in enumerate(fonts):
        try:
            codes = FT2Font(str(path)).get_charmap()
            typefaces.append(ImageFont.truetype(str(path), font_size, layout_engine=layout))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read as a font ({error}): remove or replace it") from error
        for code in filter(is_wanted, codes):
            fonts_of[code].append(font)
    return {
        code: [(font, _render(chr(code), typefaces[font])) for font in found]
        for code, found in sorted(fonts_of.items())
        if len(found) >= min_fonts
    }


def _render(character: str, typeface: ImageFont.FreeTypeFont) -> bytes:
    """The character in the middle of the image, ink 255 on paper 0."""
    image = Image.new("L", (SIZE, SIZE))
    left, top, right, bottom = typeface.getbbox(character)
    position = ((SIZE - right - left) // 2, (SIZE - bottom - top) // 2)
    ImageDraw.Draw(image).text(position, character, fill=255, font=typeface)
    return image.tobytes()


def legible(renderings: dict[int, list[Rendering]], min_fonts: int) -> dict[int, list[bytes]]:
    """The pixels of each character that enough fonts tell apart from all others.

    A rendering goes if it is blank, or if another character looks the same in its font: the same shape for two characters,
    or a box for those that the font lacks.
    """
    times = Counter(rendering for found in renderings.values() for rendering in found)
    kept = {
        code: [pixels for font, pixels in found if pixels != BLANK and times[font, pixels] == 1]
        for code, found in renderings.items()
    }
    return {code: pixels for code, pixels in kept.items() if len(pixels) >= min_fonts}


def as_images(classes: Sequence[Collection[bytes]]) -> LabelledImages:
    """The images of each class from their pixels; classes are numbered in the order given."""
    images = np.frombuffer(bytearray().join(chain(*classes)), dtype=np.uint8).reshape(-1, 1, SIZE, SIZE)
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes])
    return LabelledImages(torch.from_numpy(images), torch.from_numpy(labels))
