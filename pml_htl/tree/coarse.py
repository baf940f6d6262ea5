"""Coarse groups of classes, and a bound that tells which groups can hold none of the nearest classes of a class.

Of points x in group h and y in group g, with centres c and radii, `<x, y> = <x - c_h, y - c_g> + <x, c_g> + <c_h, y> -
<c_h, c_g>`, and the first term is at most the product of both distances to the centres (Cauchy and Schwarz). Beside the
triangle inequality this is the sharper bound: far apart are not only groups whose balls are, but all whose points lead
into different directions.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

GROUP = 100  # classes, on average
TILE = 1024  # classes of whole groups, whose product with others is one block
ROUNDS = 3
SAMPLE = 16  # classes for each group, from which centres are found
SLACK = 1e-5  # what rounding may do to a bound


def group_of_each(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The group (C,) of each of the points (C, D), by k-means; near ones have near numbers, and so share tiles."""
    groups, centres = _k_means(points, max(1, len(points) // GROUP), generator)
    neighborhoods, _ = _k_means(centres, max(1, len(points) // TILE), generator)
    return np.argsort(np.argsort(neighborhoods, kind="stable"))[groups]


def _k_means(points: np.ndarray, number: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The group (C,) of each point and the centres, at most (number, D), after a few rounds on a part of the points.

    By scikit-learn, which takes some rows at a time; SciPy's k-means makes a matrix of all points and centres.
    """
    number = min(number, len(points))
    sample = points[generator.permutation(len(points))[: SAMPLE * number]]
    found = KMeans(number, init=sample[:number], n_init=1, max_iter=ROUNDS, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of points that coincide, which does no harm
        found.fit(sample)
    return found.predict(points), found.cluster_centers_


class CoarseGroups:
    """Points that lie group by group, in tiles of whole groups, with what the bound needs.

    Args:
        points: (C, D) float32, sorted by their groups.
        groups: (C,) int64, the group of each, ascending.
        offsets: (C,) float32; the score of two points is their product and both offsets.
    """

    def __init__(self, points: torch.Tensor, groups: np.ndarray, offsets: torch.Tensor) -> None:
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        # A large group is several of the same centre, so that none is larger than a tile.
        self.starts = np.concatenate(
            [np.arange(start, end, TILE) for start, end in zip(starts, [*starts[1:], len(groups)], strict=True)]
        )
        self.ends = np.append(self.starts[1:], len(groups))
        self.of_each = np.repeat(np.arange(len(self.starts)), self.ends - self.starts)
        self.tiles = self._packed()
        self._points, self._offsets = points, offsets
        sizes = (self.ends - self.starts).astype(np.float32)[:, np.newaxis]
        self._centres = torch.from_numpy(np.add.reduceat(points.numpy(), self.starts) / sizes)
        pairs = zip(points.split(4096), torch.from_numpy(self.of_each).split(4096), strict=True)
        self._radii = torch.cat([(block - self._centres[groups_of]).norm(dim=1) for block, groups_of in pairs])
        self._largest_radii = torch.from_numpy(np.maximum.reduceat(self._radii.numpy(), self.starts))

    def _packed(self) -> list[slice]:
        """Tiles: ranges of groups that have at most TILE points together."""
        tiles, first = [], 0
        for group in range(1, len(self.starts)):
            if self.ends[group] - self.starts[first] > TILE:
                tiles.append(slice(first, group))
                first = group
        return [*tiles, slice(first, len(self.starts))]

    def members(self, groups: slice) -> slice:
        """The points of a range of groups."""
        return slice(int(self.starts[groups.start]), int(self.ends[groups.stop - 1]))

    def may_reach(self, tile: slice, reach: np.ndarray) -> np.ndarray:
        """Which points after a tile, (after, groups of the tile), may have a score above `reach` with one of a group.

        `reach` (C,): what a score has to be above to matter, to either of its two points.
        """
        inside = self.members(tile)
        centres, starts = self._centres[tile], self.starts[tile] - inside.start
        of_each = torch.from_numpy(self.of_each[inside.stop :])
        to_points = torch.addmm(self._offsets[inside], self._centres, self._points[inside].T)  # (G, inside)
        largest = torch.from_numpy(np.maximum.reduceat(to_points.numpy(), starts, axis=1)) - self._centres @ centres.T
        bounds = self._points[inside.stop :] @ centres.T
        bounds += self._offsets[inside.stop :].unsqueeze(1)
        bounds += largest[of_each]
        bounds.addcmul_(self._radii[inside.stop :].unsqueeze(1), self._largest_radii[tile])
        of_groups = torch.from_numpy(np.minimum.reduceat(reach[inside], starts))
        needed = torch.minimum(torch.from_numpy(reach[inside.stop :]).unsqueeze(1), of_groups)
        return (bounds >= needed - SLACK).numpy()
