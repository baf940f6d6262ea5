"""A page of the pairs of classes that a network tells apart least, with their images side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data import Images
from .rendering import rendered
from .thumbnails import thumbnail

PICTURES = 6  # of each class
SIZE = 96  # pixels; smaller images stay as they are


def pairs_page(table: np.ndarray, images: Images, class_names: list[str], title: str) -> str:
    """The page of a `ClassTree.confusable` of these images."""
    return rendered("pairs.html", title=title, pairs=[pair(row, images, class_names) for row in table])


def pair(row: np.void, images: Images, class_names: list[str]) -> dict[str, Any]:
    """What the page shows of a pair."""
    classes = [
        {
            "name": class_names[row[f"label_{letter}"]],
            "spread": f"{row[f'spread_{letter}']:.3f}",
            "pictures": [thumbnail(image, SIZE) for image in images.pictures_of(int(row[f"label_{letter}"]), PICTURES)],
        }
        for letter in "ab"
    ]
    return {
        "ratio": f"{row['ratio']:.2f}",
        "distance": f"{row['distance']:.3f}",
        "level": int(row["level"]),
        "classes": classes,
    }
