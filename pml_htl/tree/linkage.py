"""From class distances to the levels of the class tree (method, section 2). Pure functions on float64 arrays."""

from __future__ import annotations

import numpy as np
import scipy.cluster.hierarchy as hierarchy
import scipy.sparse as sparse
from scipy.spatial.distance import squareform

LINKAGES = ("single", "average", "complete")
MAX_SQUARED_DISTANCE = 4.0  # of two points on the unit sphere


def merge_thresholds(average_spread: float, num_levels: int) -> np.ndarray:
    """`d_l = d_0 + l (4 - d_0) / L` for l = 0..L: (L + 1,) squared distances, the first `d_0`, the last exactly 4."""
    # A spread can be 4 and, by rounding, a little more; thresholds ascend all the same.
    return np.linspace(min(average_spread, MAX_SQUARED_DISTANCE), MAX_SQUARED_DISTANCE, num_levels + 1)


def merge_classes(squared_distances: np.ndarray, linkage: str) -> tuple[np.ndarray, np.ndarray]:
    """Agglomerates classes by their distances, the nearest first.

    Args:
        squared_distances: (C, C), symmetric; the diagonal does not count.
        linkage: "single" (two groups are as far apart as their nearest classes), "average" or "complete".

    Returns:
        The C - 1 merges in ascending order: edges (C - 1, 2) int64, each between two class positions of the groups that
        merge, and heights (C - 1,), the squared distances at which they do. With single linkage they are the edges of a
        minimum spanning tree and their lengths; otherwise each group is named by its smallest class position.
    """
    if linkage == "single":
        return minimum_spanning_tree(squared_distances)
    condensed = squareform(squared_distances, checks=False)
    merges = hierarchy.average(condensed) if linkage == "average" else hierarchy.complete(condensed)
    return merges_of_scipy(merges)


def merges_of_scipy(merges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges (C - 1, 2) and heights (C - 1,) of scipy's linkage matrix (C - 1, 4), each group named by its smallest class."""
    names = list(range(len(merges) + 1))  # scipy's groups are C, C + 1, ... in the order of their making
    edges = np.empty((len(merges), 2), dtype=np.int64)
    for row, (first, second) in enumerate(merges[:, :2].astype(np.int64)):
        edges[row] = sorted((names[first], names[second]))
        names.append(edges[row, 0])
    return edges, merges[:, 2].copy()


def minimum_spanning_tree(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges (C - 1, 2) int64 in ascending order of their lengths, and the lengths (C - 1,), by Prim's algorithm.

    Zero distances are edges like others (scipy's sparse graphs take them for missing ones). O(C^2) time, O(C) memory.
    """
    num_classes = len(distances)
    nearest = np.zeros(num_classes, dtype=np.int64)  # of each class outside the tree, the nearest one inside, and how far
    length = distances[0].copy()
    beyond = np.zeros(num_classes)  # infinite for the classes inside, so that they are no nearer to anything
    length[0] = beyond[0] = np.inf
    ends, lengths = np.empty((2, num_classes - 1), dtype=np.int64), np.empty(num_classes - 1)
    candidates, closer = np.empty(num_classes), np.empty(num_classes, dtype=bool)
    for row in range(num_classes - 1):
        new = int(length.argmin())
        ends[0, row], ends[1, row], lengths[row] = nearest[new], new, length[new]
        length[new] = beyond[new] = np.inf
        np.add(distances[new], beyond, out=candidates)
        np.less(candidates, length, out=closer)
        np.copyto(nearest, new, where=closer)
        np.copyto(length, candidates, where=closer)
    order = np.argsort(lengths, kind="stable")
    return ends[:, order].T.copy(), lengths[order]


def cut_levels(edges: np.ndarray, heights: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The node of every class at every level: (C, L + 1) int64, a node named by its smallest class position.

    At level l the merges with a height strictly below `thresholds[l]` have happened; at the last level all have.
    """
    num_levels = len(thresholds) - 1
    merge_levels = np.searchsorted(thresholds, heights, side="right").clip(max=num_levels)
    return nodes_of_merges(edges, merge_levels, num_levels)


def nodes_of_merges(edges: np.ndarray, merge_levels: np.ndarray, num_levels: int) -> np.ndarray:
    """The nodes, as of `cut_levels`, where merge i of the `edges` (C - 1, 2) happens at level `merge_levels[i]`, 0 .. L."""
    num_classes = len(edges) + 1
    nodes = np.empty((num_classes, num_levels + 1), dtype=np.int64)
    own = np.arange(num_classes)
    for level in range(num_levels + 1):
        first, second = own[edges[merge_levels == level]].T  # between nodes of the level before
        if len(first):
            graph = sparse.coo_array((np.ones(len(first)), (first, second)), shape=(num_classes, num_classes))
            component = sparse.csgraph.connected_components(graph, directed=False)[1][own]
            _, smallest, inverse = np.unique(component, return_index=True, return_inverse=True)
            own = smallest[inverse]
        nodes[:, level] = own
    return nodes


def scipy_linkage(edges: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The merges as scipy's linkage matrix, (C - 1, 4) float64, for `scipy.cluster.hierarchy.dendrogram` and friends.

    `edges` may join any two members of the groups that merge; heights are ascending.
    """
    num_classes = len(edges) + 1
    parent = list(range(2 * num_classes - 1))
    size = [1] * num_classes

    merges = np.empty((num_classes - 1, 4))
    for row, (edge, height) in enumerate(zip(edges.tolist(), heights.tolist(), strict=True)):
        first, second = sorted(root_of(node, parent) for node in edge)
        size.append(size[first] + size[second])
        parent[first] = parent[second] = num_classes + row
        merges[row] = first, second, height, size[-1]
    return merges


def root_of(member: int, parent: list[int]) -> int:
    """The root of `member` in a disjoint-set forest. The path to it is halved, so that long chains stay cheap."""
    while parent[member] != member:
        parent[member] = parent[parent[member]]
        member = parent[member]
    return member


def restrict_linkage(merges: np.ndarray, leaves: np.ndarray) -> np.ndarray:
    """The part of a scipy linkage matrix that concerns some leaves: they meet at the heights at which they did.

    Args:
        merges: (C - 1, 4), as of `scipy_linkage`.
        leaves: (K,) distinct class positions; leaf k of the result is `leaves[k]`.

    Returns:
        (K - 1, 4) float64.
    """
    groups: dict[int, tuple[int, int]] = {int(leaf): (place, 1) for place, leaf in enumerate(leaves)}
    num_classes = len(merges) + 1
    kept: list[tuple[float, float, float, float]] = []
    for row, (first, second, height, _) in enumerate(merges.tolist()):
        inside = [groups[int(group)] for group in (first, second) if int(group) in groups]
        if len(inside) == 2:
            (a, a_size), (b, b_size) = sorted(inside)
            groups[num_classes + row] = len(leaves) + len(kept), a_size + b_size
            kept.append((a, b, height, a_size + b_size))
        elif inside:
            groups[num_classes + row] = inside[0]
    return np.array(kept).reshape(-1, 4)
