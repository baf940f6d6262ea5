"""The minimum spanning tree of the class distances without a C x C matrix.

The spanning tree of the k-nearest-class graph comes first. Most of its edges are proved to be right: an edge is the
shortest way out of a group of classes if none of them has its k-th neighbour nearer than that edge is long, since all that a
class does not list is farther away than its k-th neighbour. Such edges fit together, also where lengths are equal: none
of those taken before leads out of the group, and to such a set the shortest way out of a group can always be added (the cut
property of spanning trees). Edges without such a proof join groups of more than k classes.
There are few such groups, and the shortest edges between them are looked for among all pairs, block by block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sparse
import torch

from ..common.precision import full_products
from ..distributed import Ranks
from .points import ClassPoints, Lists

WHAT = "the spanning tree of the classes"
BLOCK = 1024, 1024  # points of a product; on a CPU it stays in the cache
MAX_BRIDGES = 2**22  # so many are held before those that are not needed go


def minimum_spanning_edges(points: ClassPoints, lists: Lists | None, ranks: Ranks) -> np.ndarray | None:
    """The C - 1 edges (C - 1, 2) int64 of the minimum spanning tree, in no particular order; on rank 0, None on others.

    Args:
        points: the classes.
        lists: (C, k) and (C, k), the nearest classes of each and how far they are, as of `nearest_classes`; on rank 0.
        ranks: the processes that share the work.

    Distances are float32, so that of edges whose lengths differ by less than about 1e-6 either may be taken. Memory is
    O(C (D + k)), time at most that of half a product of all points by all ranks together, beside the lists.
    """
    proved, known, groups = None, None, None
    with ranks.together(WHAT):
        if lists is not None:
            proved, known, groups = _grouped(*lists)
    groups = _Groups(**ranks.broadcast(None if groups is None else groups.tensors()))
    if groups.number == 1:
        return proved
    with ranks.together(WHAT), full_products(points.base.device):
        own = _bridges(points, groups, range(ranks.rank, groups.number, ranks.size))
    parts = [ranks.concatenate(torch.from_numpy(part)) for part in own]
    with ranks.together(WHAT), full_products(points.base.device):
        if known is None:
            return None
        found = _Bridges(*(part.numpy() for part in parts if part is not None))  # on this rank, the first, all are there
        bridges = _needed([known, found], groups.number)
        return np.concatenate([proved, _with_both_ends(points, groups, bridges)])


def _grouped(neighbors: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, _Bridges, _Groups]:
    """The edges that are proved (E, 2), those that are not, and the groups which the former make."""
    num_classes, k = neighbors.shape
    graph = sparse.csr_array((distances.ravel(), neighbors.ravel(), np.arange(0, num_classes * k + 1, k)))
    ends, lengths = _spanning_forest(graph)
    proved = _proved(ends, lengths, reach=distances[:, -1])
    groups = _components(ends[proved], num_classes)
    open_ends, open_lengths = ends[~proved], lengths[~proved]
    # Where the open edges connect all, none longer than the longest of them is needed, nor is a class whose list reaches on.
    connected = len(ends) == num_classes - 1
    active = np.flatnonzero(distances[:, -1] < (open_lengths.max(initial=0) if connected else np.inf))
    return ends[proved], _Bridges(groups[open_ends], open_ends, open_lengths), _Groups.of(groups, active)


def _spanning_forest(graph: sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """The edges (E, 2) and their lengths (E,) in ascending order; an edge may be there in one direction or both."""
    # scipy takes a length of zero for no edge.
    shifted = sparse.csr_array((graph.data + 1, graph.indices, graph.indptr), shape=(graph.shape[0],) * 2)
    forest = sparse.csgraph.minimum_spanning_tree(shifted, overwrite=True).tocoo()
    order = np.argsort(forest.data, kind="stable")
    return np.stack([forest.row[order], forest.col[order]], axis=1).astype(np.int64), forest.data[order] - 1


def _proved(ends: np.ndarray, lengths: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Which edges of a spanning forest, in ascending order, are the shortest way out of the group at one of their ends.

    `reach` (C,): all that a class does not list is at least so far.
    """
    group = list(range(len(reach)))
    reach_of_group = reach.tolist()

    def find(place: int) -> int:
        while group[place] != place:
            group[place] = place = group[group[place]]
        return place

    proved = np.empty(len(ends), dtype=bool)
    for row, ((a, b), length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        a, b = find(a), find(b)
        proved[row] = max(reach_of_group[a], reach_of_group[b]) >= length
        group[b] = a
        reach_of_group[a] = min(reach_of_group[a], reach_of_group[b])
    return proved


def _components(ends: np.ndarray, num_classes: int) -> np.ndarray:
    graph = sparse.coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(num_classes, num_classes))
    _, components = sparse.csgraph.connected_components(graph, directed=False)
    return components.astype(np.int64)  # pairs of them are numbered, up to the square of their number


class _Bridges(NamedTuple):
    """Edges between groups: the two groups (E, 2), the class at each end (E, 2), of which the first may be -1 for not known
    yet, and the lengths (E,)."""

    groups: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray


class _Groups(NamedTuple):
    """The groups of classes, and those classes that may have a bridge which is not known.

    classes: (C,) the group of each class, 0 .. G - 1.
    members: (A,) those classes, group by group, the small ones first, since each is compared with all that come after it.
    """

    classes: torch.Tensor
    members: torch.Tensor

    @classmethod
    def of(cls, classes: np.ndarray, active: np.ndarray) -> _Groups:
        """Those classes, sorted."""
        sizes = np.bincount(classes[active], minlength=classes.max() + 1)
        order = np.lexsort((classes[active], sizes[classes[active]]))
        return cls(torch.from_numpy(classes), torch.from_numpy(active[order]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """By their names."""
        return self._asdict()

    @property
    def number(self) -> int:
        """How many groups there are."""
        return int(self.classes.max()) + 1

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the groups of the members start and end."""
        starts = np.flatnonzero(np.diff(self.classes[self.members].numpy(), prepend=-1))
        return starts, np.append(starts[1:], len(self.members))


def _bridges(points: ClassPoints, groups: _Groups, share: range) -> _Bridges:
    """The shortest edges from some groups (those in these places of their row) to each that comes after, if needed."""
    classes, members = groups.classes.numpy(), groups.members.numpy()
    starts, ends = groups.bounds()
    queries, base = (side[groups.members.to(side.device)] for side in (points.queries, points.base))
    none = np.empty((0, 2), dtype=np.int64)
    found, num_found = [_Bridges(none, none, np.empty(0))], 0
    for place in share:
        if place >= len(starts) - 1:  # nothing comes after the last; groups without such members have no place
            break
        start, end = starts[place], ends[place]
        best = _largest_scores(base[end:], queries[start:end])
        columns = _first_largest(best, starts[place + 1 :] - end)
        others = members[end + columns]
        pairs = np.stack([np.full_like(others, classes[members[start]]), classes[others]], axis=1)
        found.append(_Bridges(pairs, np.stack([np.full_like(others, -1), others], axis=1), points.squared(best[columns])))
        num_found += len(others)
        if num_found > MAX_BRIDGES:
            found, num_found = [_needed(found, groups.number)], 0
    return _needed(found, groups.number)


def _with_both_ends(points: ClassPoints, groups: _Groups, bridges: _Bridges) -> np.ndarray:
    """The ends of bridges (E, 2), those looked up that are not known."""
    classes, members = groups.classes.numpy(), groups.members.numpy()
    members_of = {classes[members[start]]: slice(start, end) for start, end in zip(*groups.bounds(), strict=True)}
    for row in np.flatnonzero(bridges.ends[:, 0] < 0):
        ours = members[members_of[bridges.groups[row, 0]]]
        scores = points.queries[torch.from_numpy(ours).to(points.queries.device)] @ points.base[bridges.ends[row, 1]]
        bridges.ends[row, 0] = ours[int(scores.argmax())]
    return bridges.ends


def _largest_scores(base: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    """The largest score of each base point (M,) float32 with any of the queries, in blocks."""
    num_base, num_queries = BLOCK
    largest = []
    for points in base.split(num_base):
        scores = [(points @ block.T).amax(dim=1) for block in queries.split(num_queries)]
        largest.append(torch.stack(scores).amax(dim=0))
    return torch.cat(largest).cpu().numpy()


def _first_largest(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The place of the largest value of each segment (the first of equal ones); segments begin at `starts`."""
    lengths = np.diff(np.append(starts, len(values)))
    largest = np.flatnonzero(values == np.repeat(np.maximum.reduceat(values, starts), lengths))
    segments = np.searchsorted(starts, largest, side="right")
    return largest[np.unique(segments, return_index=True)[1]]


def _needed(found: list[_Bridges], num_groups: int) -> _Bridges:
    """Those that a minimum spanning tree of the groups takes."""
    groups, ends, lengths = (np.concatenate(parts) for parts in zip(*found, strict=True))
    names = groups.min(axis=1) * num_groups + groups.max(axis=1)
    order = np.lexsort((lengths, names))
    names, firsts = np.unique(names[order], return_index=True)
    shortest = order[firsts]  # of each pair of groups
    matrix = sparse.coo_array((lengths[shortest], np.divmod(names, num_groups)), shape=(num_groups, num_groups))
    forest, _ = _spanning_forest(matrix.tocsr())
    taken = shortest[np.searchsorted(names, forest.min(axis=1) * num_groups + forest.max(axis=1))]
    return _Bridges(groups[taken], ends[taken], lengths[taken])
