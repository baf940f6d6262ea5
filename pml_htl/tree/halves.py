"""The nearest classes of each class on a CPU, by about half a product: each score is for the lists of both its classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..common.precision import full_products
from ..distributed import Ranks
from .coarse import CoarseGroups, group_of_each
from .points import ClassPoints, Lists
from .shortlists import Shortlists

WHAT = "the search for the nearest classes"
ROWS = 1024  # of a block of scores, which stays in the cache
MERGED = 2**16  # rows of all ranks that are merged at a time


def search_by_halves(points: ClassPoints, k: int, ranks: Ranks) -> Lists | None:
    """The k largest scores of each class with others, largest first: positions (C, k) and scores (C, k); on rank 0.

    Classes are sorted by coarse groups and cut into tiles. Each tile meets itself, so that the lists are good from the
    start, and then those classes of the tiles after it that the bound of the groups does not rule out. The ranks deal out
    the tiles.
    """
    groups = None
    with ranks.together(WHAT), full_products(points.base.device):
        if ranks.rank == 0:  # rounding on another machine may group them otherwise
            groups = {"groups": torch.from_numpy(group_of_each(points.means.numpy(), np.random.default_rng(0)))}
    of_each = ranks.broadcast(groups)["groups"]
    with ranks.together(WHAT), full_products(points.base.device):
        order = torch.argsort(of_each, stable=True)
        own = _share(points.take(order), of_each[order].numpy(), k, ranks)
    merged = _merged(*own, ranks)
    if merged is None:
        return None
    owners, scores = np.empty_like(merged[0]), np.empty_like(merged[1])
    owners[order.numpy()], scores[order.numpy()] = order.numpy()[merged[0]], merged[1]
    return owners, scores


def _share(points: ClassPoints, groups: np.ndarray, k: int, ranks: Ranks) -> Lists:
    """The best of this rank's tiles, of classes that are sorted by groups; those within the tiles on rank 0 alone."""
    coarse = CoarseGroups(points.means, groups, points.offsets)
    lists = Shortlists(len(groups), k)
    for tile in coarse.tiles:
        rows = np.arange(len(groups))[coarse.members(tile)]
        lists.offer(rows, _scores(points, rows, rows).fill_diagonal_(-torch.inf).numpy(), rows)
        lists.cut(rows)
    if ranks.rank > 0:
        lists.clear()
    for tile in coarse.tiles[ranks.rank :: ranks.size]:
        for rows, columns in _needed(coarse, tile, lists.reach):
            for some in np.array_split(rows, -(-len(rows) // ROWS)):
                scores = _scores(points, some, columns).numpy()
                lists.offer(some, scores, columns)
                lists.offer(columns, scores.T, some)
    return lists.best()


def _needed(coarse: CoarseGroups, tile: slice, reach: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What a tile has to meet, as rows after it and columns in it: with the whole tile, or with each of its groups."""
    needed = coarse.may_reach(tile, reach)
    after = coarse.members(tile).stop
    rows = np.flatnonzero(needed.any(axis=1))
    # A block of a whole tile is multiplied about twice as fast as those of its groups.
    if 2 * needed.sum() > needed.shape[1] * len(rows):
        ranges = [(rows, tile)]
    else:
        groups = range(tile.start, tile.stop)
        ranges = [(np.flatnonzero(needed[:, group - tile.start]), slice(group, group + 1)) for group in groups]
    for rows, columns in ranges:
        members = coarse.members(columns)
        if len(rows):
            yield rows + after, np.arange(members.start, members.stop)


def _scores(points: ClassPoints, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """The scores (R, M) of rows in ascending order with columns that follow one another."""
    are_neighbors = rows[-1] - rows[0] == len(rows) - 1  # then nothing is copied
    queries = points.queries[rows[0] : rows[-1] + 1] if are_neighbors else points.queries[torch.from_numpy(rows)]
    return queries @ points.base[columns[0] : columns[-1] + 1].T


def _merged(owners: np.ndarray, scores: np.ndarray, ranks: Ranks) -> Lists | None:
    """The best of all ranks' lists (C, k), the largest first; on rank 0."""
    if ranks.size == 1:
        return owners, scores
    num_rows, k = owners.shape
    found = []
    for start in range(0, num_rows, MERGED):
        rows = slice(start, start + MERGED)
        of_all = [ranks.concatenate(torch.from_numpy(part[rows].copy())) for part in (owners, scores)]
        if of_all[0] is None or of_all[1] is None:
            continue
        whose, values = (part.view(ranks.size, -1, k).transpose(0, 1).flatten(1) for part in of_all if part is not None)
        best, places = values.topk(k)
        found.append((whose.gather(1, places), best))
    if not found:
        return None
    return torch.cat([part for part, _ in found]).numpy(), torch.cat([part for _, part in found]).numpy()
