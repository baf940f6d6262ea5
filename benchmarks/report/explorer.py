"""What the page's explorer shows of a trained class tree: classes with thumbnails, their merges, neighbours and margins."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pml_htl import ClassTree, DynamicMarginMiner

from ..data import Splits

NEIGHBORS = 8
THUMBNAIL = 32  # pixels
MOST_THUMBNAILS = 3_000  # a page has to stay small
KEYS = ("title", "data", "names", "thumbnails", "spreads", "average_spread", "thresholds", "merges", "nearest")


def explorer_document(tree: ClassTree, miner: DynamicMarginMiner, data: Splits, title: str) -> dict[str, Any]:
    """The tree of `data.train` as plain numbers; `nearest` holds for each class of its neighbours (position, squared
    distance at which they merge, level, margin)."""
    tree = tree.cpu()
    labels = tree.part("labels")
    near = tree.neighbors(labels, min(NEIGHBORS, tree.part("nearest_classes").shape[1]))  # (C, k)
    anchors = labels.unsqueeze(1)
    columns = [
        torch.searchsorted(labels, near),
        tree.cophenetic_distances(anchors, near),
        tree.merge_levels(anchors, near),
        miner.margins(anchors, near),
    ]
    some = labels[:MOST_THUMBNAILS].tolist()
    return {
        "title": title,
        "data": data.name,
        "names": [data.class_names[label] for label in labels.tolist()],
        "thumbnails": [thumbnail(data.train.pictures_of(label)[0]) for label in some],
        "spreads": rounded(tree.part("spreads")),
        "average_spread": round(tree.d_0, 4),
        "thresholds": rounded(tree.part("thresholds")),
        "merges": rounded(torch.from_numpy(tree.to_scipy_linkage())),
        "nearest": [[rounded(column[row]) for column in columns] for row in range(len(labels))],
    }


def rounded(values: torch.Tensor) -> Any:
    """As lists, with four digits."""
    return np.round(values.double().numpy(), 4).tolist()


def thumbnail(image: torch.Tensor, size: int = THUMBNAIL) -> str:
    """A small PNG of an image (channels, height, width) in 0..1, as a data URI."""
    pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((size, size))
    if picture.mode == "L":
        picture = picture.quantize(8)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def save_explorer(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def validate(document: dict[str, Any]) -> None:
    """Raises a `ValueError` that names what is not as it should be."""
    missing = [key for key in KEYS if key not in document]
    if missing:
        raise ValueError(f"a class tree for the explorer lacks {', '.join(missing)}")
    num_classes = len(document["names"])
    for key, wanted in (("merges", num_classes - 1), ("nearest", num_classes), ("spreads", num_classes)):
        if len(document[key]) != wanted:
            raise ValueError(f"{key} of {num_classes} classes should be {wanted}, but there are {len(document[key])}")
