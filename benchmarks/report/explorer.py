"""What the page's explorer shows of a trained class tree: classes with thumbnails, their merges, neighbours and margins."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pml_htl import ClassTree, DynamicMarginMiner

from ..data import Splits
from .thumbnails import thumbnail

NEIGHBORS = 8
PAIRS = 30
MOST_THUMBNAILS = 3_000  # a page has to stay small
KEYS = ("title", "data", "names", "thumbnails", "spreads", "average_spread", "thresholds", "merges", "nearest", "pairs")


def explorer_document(tree: ClassTree, miner: DynamicMarginMiner, data: Splits, title: str) -> dict[str, Any]:
    """The tree of `data.train` as plain numbers.

    `nearest` holds for each class of its neighbours (position, squared distance at which they merge, level, margin), and
    `pairs` the classes that are told apart least (two positions, ratio, distance, level).
    """
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
    pairs = np.asarray(tree.confusable(PAIRS))
    places = [np.searchsorted(labels.numpy(), pairs[name]).tolist() for name in ("label_a", "label_b")]
    numbers = [np.round(pairs[name], 4).tolist() for name in ("ratio", "distance", "level")]
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
        "pairs": list(zip(*places, *numbers, strict=True)),
    }


def rounded(values: torch.Tensor) -> Any:
    """As lists, with four digits."""
    return np.round(values.double().numpy(), 4).tolist()


def validate(document: dict[str, Any]) -> None:
    """Raises a `ValueError` that names what is not as it should be."""
    missing = [key for key in KEYS if key not in document]
    if missing:
        raise ValueError(f"a class tree for the explorer lacks {', '.join(missing)}")
    num_classes = len(document["names"])
    for key, wanted in (("merges", num_classes - 1), ("nearest", num_classes), ("spreads", num_classes)):
        if len(document[key]) != wanted:
            raise ValueError(f"{key} of {num_classes} classes should be {wanted}, but there are {len(document[key])}")
