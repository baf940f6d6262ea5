"""The nearest classes of each class."""

from __future__ import annotations

import numpy as np
import torch

from ..common.precision import full_products
from ..distributed import Ranks
from .halves import WHAT, search_by_halves
from .points import ClassPoints, Lists

ROWS, COLUMNS = 1024, 32768  # of a block of scores: 128 MiB


def nearest_classes(points: ClassPoints, k: int, ranks: Ranks) -> Lists | None:
    """The k nearest other classes of each, nearest first: positions (C, k) int64 and squared distances (C, k) float64.

    On rank 0; None on the others, which share the work. Products are float32, so distances are right to about 1e-6, and
    classes nearer to each other than that come in any order. Memory is O(C (D + k)). Time is O(C^2 D): on a CPU about half
    a product, and less where bounds tell that groups of classes are not near each other; elsewhere that of a whole one.
    """
    search = search_by_halves if points.base.device.type == "cpu" else search_by_rows
    found = search(points, k, ranks)
    return None if found is None else (found[0].astype(np.int64), points.squared(found[1]))


def search_by_rows(points: ClassPoints, k: int, ranks: Ranks) -> Lists | None:
    """The k largest scores of each class with others, largest first: positions (C, k) and scores (C, k); on rank 0.

    By whole rows of scores in large blocks, as a GPU has them. Each rank has its share of the rows.
    """
    with ranks.together(WHAT), full_products(points.base.device):
        rows = ranks.share_of(len(points.base))
        found, scores = _largest(points.queries[rows], points.base, k + 1)
        own = found == np.arange(len(points.base))[rows, np.newaxis]
        own[~own.any(axis=1), -1] = True  # it is crowded out by others at the same place
        part = found[~own].reshape(-1, k), scores[~own].reshape(-1, k)
    positions, best = (ranks.concatenate(torch.from_numpy(values)) for values in part)
    return None if positions is None or best is None else (positions.numpy(), best.numpy())


def _largest(queries: torch.Tensor, base: torch.Tensor, k: int) -> Lists:
    """The k largest scores of each query, largest first: places in `base` (queries, k) and scores (queries, k) float32."""
    found, scores = np.empty((len(queries), k), dtype=np.int64), np.empty((len(queries), k), dtype=np.float32)
    for start in range(0, len(queries), ROWS):
        best: list[torch.Tensor] = []
        columns: list[torch.Tensor] = []
        for first in range(0, len(base), COLUMNS):
            block = queries[start : start + ROWS] @ base[first : first + COLUMNS].T
            values, places = block.topk(min(k, block.shape[1]))
            best.append(values)
            columns.append(places + first)
        values, places = torch.cat(best, dim=1).topk(k)
        scores[start : start + ROWS] = values.cpu().numpy()
        found[start : start + ROWS] = torch.cat(columns, dim=1).gather(1, places).cpu().numpy()
    return found, scores
