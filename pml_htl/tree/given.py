"""A hierarchy of classes that is given, not found: by squared distances, or by a taxonomy. Pure functions on arrays.

It consists of merges, as those that are found: edges, heights and nearest classes. The heights of a taxonomy are whole
numbers of levels h out of H, and become squared distances, `d_0 + (h / H) (4 - d_0)`, with each new average spread `d_0`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch

from ..common.labels import Labels, integer_at_least, label_tensor, name_some
from . import linkage as linkages
from .merging import Merges

Numbers: TypeAlias = torch.Tensor | np.ndarray | Sequence[float] | Sequence[Sequence[float]]

ROUNDING = 1e-5  # of squared distances that were computed in float32


def sort_classes(labels: Labels) -> tuple[torch.Tensor, np.ndarray]:
    """Distinct labels (C,) of any order as a sorted int64 tensor, and the row (C,) in which each of these was given."""
    given = label_tensor(labels, "cpu")
    if given.ndim != 1:
        raise ValueError(f"labels must be of shape (C,), one for each class, but they are {tuple(given.shape)}")
    known, order = given.sort()
    again = known[1:][known.diff() == 0]
    if len(again):
        raise ValueError(f"labels must be those of the classes, each of them once, but {name_some(again)} came again")
    if len(known) < 2:
        raise ValueError(f"a class tree needs at least two classes, but labels has {len(known)}")
    return known, order.numpy()


def check_distances(squared_distances: Numbers, labels: torch.Tensor, order: np.ndarray) -> np.ndarray:
    """A matrix of squared distances between classes (C, C), float64, its rows and columns in the order of `labels` (C,).

    The diagonal becomes zero, as do values below it by rounding; what symmetry lacks by rounding is evened out.
    """
    matrix = _floats("squared_distances", squared_distances, "(C, C)", (len(labels), len(labels)))[np.ix_(order, order)]
    np.fill_diagonal(matrix, 0)

    def of_pair(place: int) -> str:
        a, b = np.unravel_index(place, matrix.shape)
        return f"{matrix[a, b]:.6g} from class {labels[a].item()} to class {labels[b].item()}"

    _check_range("squared_distances", matrix, of_pair)
    uneven = np.abs(matrix - matrix.T)
    if uneven.max() > ROUNDING:
        a, b = np.unravel_index(uneven.argmax(), matrix.shape)
        raise ValueError(
            f"squared_distances must be symmetric, but it has {of_pair(uneven.argmax())} and {matrix[b, a]:.6g} back; "
            "give the mean of the matrix and its transpose"
        )
    del uneven
    matrix = (matrix + matrix.T) / 2
    return matrix.clip(min=0, out=matrix)


def check_spreads(spreads: Numbers, labels: torch.Tensor, order: np.ndarray) -> torch.Tensor:
    """Spreads of classes (C,), a float64 tensor in the order of `labels` (C,)."""
    values = _floats("spreads", spreads, "(C,)", (len(labels),))[order]
    _check_range("spreads", values, lambda place: f"{values[place]:.6g} of class {labels[place].item()}")
    return torch.from_numpy(values.clip(min=0))


def check_ancestors(ancestors: Labels, labels: torch.Tensor, order: np.ndarray) -> np.ndarray:
    """The ancestors of classes (C, H), int64, in the order of `labels` (C,).

    Raises a `ValueError` that names two classes if they have an ancestor in common and other ones above it, or no root.
    """
    try:
        given = label_tensor(ancestors, "cpu").numpy()
    except TypeError as error:
        raise TypeError(f"ancestors must be integers: {error}") from None
    if given.ndim != 2 or len(given) != len(labels) or given.shape[1] == 0:
        raise ValueError(
            f"ancestors must be of shape (C, H), a row for each of the {len(labels)} labels and at least one column, "
            f"but it is {given.shape}"
        )
    table = given[order]
    for column in range(table.shape[1] - 1):
        below, above = table[:, column], table[:, column + 1]
        row = np.lexsort((above, below))
        parted = np.flatnonzero((np.diff(below[row]) == 0) & (np.diff(above[row]) != 0))
        if len(parted):
            a, b = row[parted[0]], row[parted[0] + 1]
            raise ValueError(
                f"ancestors must be nested, but classes {labels[a].item()} and {labels[b].item()} share ancestor {below[a]} "
                f"in column {column} and have {above[a]} and {above[b]} in column {column + 1}; give each node of a column "
                "a number of its own"
            )
    other = np.flatnonzero(table[:, -1] != table[0, -1])
    if len(other):
        raise ValueError(
            f"the last column of ancestors must be the root of all classes, but class {labels[0].item()} has {table[0, -1]} "
            f"there and class {labels[other[0]].item()} has {table[other[0], -1]}; append a column of zeros"
        )
    return table


def check_same_classes(found: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises a `ValueError` that names what differs unless the classes of a refresh (C,) are those of a given hierarchy."""
    if not np.array_equal(found.cpu().numpy(), labels.cpu().numpy()):
        differing = torch.from_numpy(np.setxor1d(found.cpu().numpy(), labels.cpu().numpy()))
        raise ValueError(
            f"the statistics have {len(found)} classes and the tree's given hierarchy has {len(labels)}: only one of them "
            f"knows {name_some(differing)}; give both the same labels, before or after any mapping of labels"
        )


def merges_of_distances(distances: np.ndarray, linkage: str, num_neighbors: int, seed: int) -> Merges:
    """The merges by a matrix of squared distances (C, C), and the nearest classes of each by the same.

    Of equally near classes each class has its own random order. O(C^2) time and, beside the matrix, O(C k) memory.
    """
    generator = _generator(seed)
    nearest = np.empty((len(distances), num_neighbors), dtype=np.int64)
    nearest_distances = np.empty((len(distances), num_neighbors))
    for place, row in enumerate(distances):
        others = generator.permutation(len(row))
        others = others[others != place]
        others = others[np.argpartition(row[others], num_neighbors - 1)[:num_neighbors]]
        nearest[place] = others[np.argsort(row[others])]
        nearest_distances[place] = row[nearest[place]]
    return Merges(*linkages.merge_classes(distances, linkage), nearest, nearest_distances)


def merges_of_taxonomy(ancestors: np.ndarray, num_neighbors: int, seed: int) -> Merges:
    """The merges by ancestors (C, H) that are nested, with heights 1.0 .. H, and nearest classes: those that meet lowest.

    Of classes that meet equally low each class has its own random order. O(C (H + k)) memory and, but for sorting, time.
    """
    # In the order of their ancestors, the uppermost first, the classes of every node stand side by side.
    row = np.lexsort(ancestors.T)
    heights = 1 + (ancestors[row[1:]] != ancestors[row[:-1]]).sum(axis=1)  # between each class of the row and the next
    order = np.argsort(heights, kind="stable")
    edges = np.stack([row[:-1], row[1:]], axis=1)[order]
    nearest = np.empty((len(row), num_neighbors), dtype=np.int64)
    nearest[row] = row[_nearest_in_row(heights, ancestors.shape[1], num_neighbors, _generator(seed))]
    return Merges(edges, heights[order].astype(np.float64), nearest)


def apply_heights(
    edges: np.ndarray, given_heights: np.ndarray, taxonomy_height: int, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where given merges lie among thresholds: the squared distances of the merges (C - 1,), and the nodes (C, L + 1).

    Args:
        edges: (C - 1, 2), in the order of the merges.
        given_heights: (C - 1,) ascending; levels 1 .. H of a taxonomy, or squared distances.
        taxonomy_height: H; 0 for squared distances.
        thresholds: (L + 1,), from `d_0` to 4.

    Classes of a taxonomy that meet at height h do so at level `ceil(h L / H)`, in whole numbers: the first level whose
    threshold is not below their merge. With L = H that is level h, and its threshold the merge's squared distance.
    """
    if taxonomy_height == 0:
        return given_heights, linkages.cut_levels(edges, given_heights, thresholds)
    steps, num_levels = given_heights.astype(np.int64), len(thresholds) - 1
    merge_heights = linkages.merge_thresholds(thresholds[0], taxonomy_height)[steps]
    return merge_heights, linkages.nodes_of_merges(edges, -(-steps * num_levels // taxonomy_height), num_levels)


def _nearest_in_row(heights: np.ndarray, top: int, num_neighbors: int, generator: np.random.Generator) -> np.ndarray:
    """For each place in a row, with `heights` (C - 1,) between neighbours, the k places that it meets lowest: (C, k)."""
    num_classes = len(heights) + 1
    nearest = np.empty((num_classes, num_neighbors), dtype=np.int64)
    found = np.zeros(num_classes, dtype=np.int64)
    inner_start, inner_end = np.arange(num_classes), np.arange(1, num_classes + 1)
    for height in range(1, top + 1):
        is_first = np.append(True, heights > height)  # of those that meet at this height
        starts = np.flatnonzero(is_first)
        run = np.cumsum(is_first) - 1
        start, end = starts[run], np.append(starts[1:], num_classes)[run]
        is_new = end - start > inner_end - inner_start
        for place in np.flatnonzero(is_new & (found < num_neighbors)).tolist():
            first, size = start[place], end[place] - start[place]
            skip_from, skipped = inner_start[place], inner_end[place] - inner_start[place]
            wanted = min(num_neighbors - found[place], size - skipped)
            drawn = first + generator.choice(size - skipped, wanted, replace=False)
            drawn[drawn >= skip_from] += skipped
            nearest[place, found[place] : found[place] + wanted] = drawn
            found[place] += wanted
        inner_start, inner_end = start, end
    return nearest


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(integer_at_least(0, "seed", seed))


def _floats(name: str, values: Numbers, axes: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float64 array of the expected shape."""
    tensor = values.detach() if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, but they are of type {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be of shape {axes} for the {shape[0]} labels, but it is {tuple(tensor.shape)}")
    return tensor.cpu().to(torch.float64).numpy()


def _check_range(name: str, values: np.ndarray, describe: Callable[[int], str]) -> None:
    wrong = ~((values >= -ROUNDING) & (values <= linkages.MAX_SQUARED_DISTANCE + ROUNDING))  # NaN is wrong, too
    if wrong.any():
        raise ValueError(
            f"{name} must be squared distances of normalised embeddings, from 0 to 4, but there is "
            f"{describe(np.flatnonzero(wrong)[0])}; bring others to that scale first"
        )
