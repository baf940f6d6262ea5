"""From class statistics to merges and neighbours: by the matrix of all class distances, or at scale without it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..common.labels import name_some
from ..distributed import Ranks
from .halves import WHAT
from .linkage import MAX_SQUARED_DISTANCE, merge_classes
from .nearest import nearest_classes
from .points import class_points
from .spanning import minimum_spanning_edges
from .statistics import ClassStatistics

MAX_MATRIX_CLASSES = 2048  # up to so many the matrix, 32 MiB, is as quick
MIN_NEIGHBORS = 16  # shorter lists prove too few edges


class Merges(NamedTuple):
    """edges (C - 1, 2) int64 and heights (C - 1,) float64 as of `merge_classes`; nearest (C, k) int64, nearest first, and
    their squared distances (C, k), if there are any."""

    edges: np.ndarray
    heights: np.ndarray
    nearest: np.ndarray
    nearest_distances: np.ndarray | None = None


def merge_and_find_nearest(
    statistics: ClassStatistics, linkage: str, num_neighbors: int, device: torch.device, ranks: Ranks
) -> Merges | None:
    """The merges of all classes, and the `num_neighbors` nearest other classes of each; on rank 0, None on others.

    With single linkage and many classes, products run in float32 on `device`, time is that of one or two products of all
    class means by all ranks together, and memory O(C (D + k)). Heights are float64 there too; of edges that differ by less
    than about 1e-6 either may be taken. Otherwise time and memory are O(C^2), and everything is float64, on the device of
    the statistics, on rank 0 alone.
    """
    if linkage != "single" or len(statistics.labels) <= MAX_MATRIX_CLASSES:
        with ranks.together(WHAT):
            return _by_matrix(statistics, linkage, num_neighbors) if ranks.rank == 0 else None
    with ranks.together(WHAT):
        points = class_points(statistics, device)
    lists = nearest_classes(points, max(num_neighbors, MIN_NEIGHBORS), ranks)
    edges = minimum_spanning_edges(points, lists, ranks)
    if lists is None or edges is None:
        return None
    heights = statistics.squared_distances_of(torch.from_numpy(edges)).cpu().numpy()
    order = np.argsort(heights, kind="stable")
    return Merges(edges[order], heights[order], lists[0][:, :num_neighbors], lists[1][:, :num_neighbors])


def _by_matrix(statistics: ClassStatistics, linkage: str, num_neighbors: int) -> Merges:
    distances = statistics.squared_distances()
    edges, heights = merge_classes(distances.cpu().numpy(), linkage)
    nearest = distances.fill_diagonal_(torch.inf).topk(num_neighbors, largest=False)
    return Merges(edges, heights, nearest.indices.cpu().numpy(), nearest.values.cpu().numpy())


def check_statistics(statistics: ClassStatistics, partial: bool) -> None:
    """Raises a `ValueError` that says why there is no tree of these statistics, as documented at `ClassTree.fit`."""
    labels, counts = statistics.labels, statistics.counts
    if len(labels) < 2:
        raise ValueError(f"a class tree needs at least two classes, but the data set has one, {name_some(labels)}")
    if (counts == 0).any() and not partial:
        raise ValueError(
            f"there are no samples of {name_some(labels[counts == 0])}; a class tree needs some of every class, unless it "
            "is fitted with partial=True"
        )
    if (counts > 0).sum() < 2:
        raise ValueError(f"a class tree needs at least two classes with samples, but there are {int((counts > 0).sum())}")
    if not statistics.is_finite():
        raise ValueError("the class statistics hold NaN or infinite values; the tree is left as it was")
    if statistics.average_spread.isnan():
        raise ValueError("every class has a single sample; the average spread needs at least one class with two")
    if statistics.average_spread > MAX_SQUARED_DISTANCE * (1 + 1e-6):
        raise ValueError(
            f"the average spread is {statistics.average_spread:.4g}, but squared distances of normalised embeddings "
            "are at most 4; normalise the embeddings"
        )
