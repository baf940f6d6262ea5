"""The level and the height at which any two classes meet, without a table of all pairs.

All classes stand in a row such that every merge joins two neighbouring runs of it. Two classes then meet at the largest of
the heights between their places, and a table of the maxima over runs of 1, 2, 4, ... gaps answers that in two look-ups.
"""

from __future__ import annotations

import numpy as np
import torch

from ..common.transforms import transforms_active
from .linkage import root_of

BLOCK_ELEMENTS = 2**20


def lay_out(edges: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes in a row in which every merge joins two neighbouring runs.

    Args:
        edges: (C - 1, 2) class positions, in the order of the merges: any members of the two groups that merge.
        heights: (C - 1,), ascending.

    Returns:
        The place of each class in the row (C,) int64, and the height between each place and the next (C - 1,) float64.
    """
    num_classes = len(edges) + 1
    parent = list(range(num_classes))
    last = list(range(num_classes))  # of the run of each group, which begins with the class that the group is named by
    following = [-1] * num_classes
    height_after = [0.0] * num_classes

    for (a, b), height in zip(edges.tolist(), heights.tolist(), strict=True):
        first, second = root_of(a, parent), root_of(b, parent)
        parent[second] = first
        following[last[first]] = second
        height_after[last[first]] = height
        last[first] = last[second]

    row = [root_of(0, parent)]
    while len(row) < num_classes:
        row.append(following[row[-1]])
    places = np.empty(num_classes, dtype=np.int64)
    places[row] = np.arange(num_classes)
    return places, np.array([height_after[member] for member in row[:-1]])


def maxima_of_runs(gaps: np.ndarray) -> np.ndarray:
    """Row k holds the largest of the 2^k gaps from each on: (floor(log2 G) + 1, G) float64; O(G log G) memory."""
    maxima = [gaps]
    while 2 ** len(maxima) <= len(gaps):
        shorter, half = maxima[-1], 2 ** (len(maxima) - 1)
        longer = shorter.copy()  # where a run would end behind the last gap, its value is never asked for
        longer[:-half] = np.maximum(shorter[:-half], shorter[half:])
        maxima.append(longer)
    return np.stack(maxima)


def largest_between(maxima: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The largest gap between two places: of the type of `maxima` (`maxima_of_runs`), 0 between a place and itself.

    `a` and `b` are places, int64 of shapes that broadcast.
    """
    start, end = torch.minimum(a, b), torch.maximum(a, b)
    distance = end - start
    # In float32, which all devices have, the logarithm may come out too high by one for long distances, which is put right,
    # or too low by one for a power of two, where two runs of half its length span all gaps as well.
    at_least_1 = distance.clamp(min=1)
    row = at_least_1.float().log2().long()
    row -= (torch.ones_like(row) << row > at_least_1).long()
    run = torch.ones_like(row) << row
    # The two runs meet or overlap, and span all gaps; between a place and itself there is none, and any index will do.
    last = maxima.shape[1] - 1
    found = torch.maximum(maxima[row, start.clamp(max=last)], maxima[row, (end - run).clamp(min=0)])
    return torch.where(distance > 0, found, 0)


def levels_between(a_nodes: torch.Tensor, b_nodes: torch.Tensor) -> torch.Tensor:
    """The level at which every class of (A, L) meets every one of (B, L), by their nodes at L levels: (A, B) int64, 0 .. L.

    Classes that have met stay together, so it is the number of levels at which their nodes differ.
    """
    num_levels, columns = a_nodes.shape[1], b_nodes.T.to(torch.int32).unsqueeze(1)
    found = []
    for block in a_nodes.split(max(1, BLOCK_ELEMENTS // max(1, num_levels * len(b_nodes)))):
        rows = block.T.to(torch.int32).unsqueeze(2)
        if transforms_active():  # which know no `out`
            differ = (rows != columns).to(torch.int32)
        else:  # as numbers, which is several times faster than as a mask
            differ = torch.ne(rows, columns, out=rows.new_empty(num_levels, len(block), len(b_nodes)))
        found.append(differ.sum(dim=0, dtype=torch.int32))
    return (found[0] if len(found) == 1 else torch.cat(found)).long()
