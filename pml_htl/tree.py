"""The class tree: which classes merge at which of L + 1 thresholds (method, section 2)."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import linkage as linkages
from .batches import check_embeddings, check_lengths, joint_shape
from .cophenetic import largest_between, lay_out, maxima_of_runs
from .labels import Labels, integer_at_least, label_tensor, name_some, positions
from .merging import merge_and_find_nearest
from .statistics import ClassStatistics
from .tree_state import FORMAT_VERSION, NAMES, problem_with

COLLAPSED_SPREAD = 1e-4


class _Unrecorded(UserDict):
    """A mapping that is no dict. PML's hook container records whatever dicts it finds in a loss, tables and all."""


class ClassTree(torch.nn.Module):
    """Hierarchical class tree over squared distances between classes.

    Two classes whose mean squared distance lies below `d_l = d_0 + l (4 - d_0) / L` stand in the same node at level l
    (transitively: single linkage); at level L all do. Source: HTL (Ge et al., ECCV 2018), section 3.1.

    One tree is shared: the sampler asks it for near classes, the miner for the margins of class pairs. Build it from
    statistics (`fit`), from embeddings (`fit_embeddings`) or, in training, by `TreeRefresh`.

    Args:
        num_levels: L, 16 in the paper.
        linkage: "single" (the paper's), or "average" or "complete" for comparison.
        max_neighbors: how many nearest classes of each class are kept for `neighbors`.

    Attributes (buffers, None while the tree is not fitted; distances are squared):
        labels: (C,) int64, the sorted labels of the classes.
        thresholds: (L + 1,) float64, `d_0 .. d_L`.
        spreads: (C,) float64, `s_c`; a class with one sample has the average spread.
        average_spread: float64 scalar, `d_0`.
        nodes: (C, L + 1) int64, the node of each class at each level, named by its smallest class position.
        merge_edges, merge_heights: (C - 1, 2) int64 and (C - 1,) float64, the merges in ascending order as pairs of class
            positions; with single linkage the edges of the minimum spanning tree and their lengths.
        nearest_classes: (C, min(max_neighbors, C - 1)) int64, positions of the nearest other classes, nearest first.

    The state travels in `state_dict()`, also into an unfitted tree, and is replaced as a whole or not at all. `.to(device)`
    moves it; `.half()`, `.double()` and the like leave its types as they are. Look-ups for labels on another device use a
    copy there, made once per fit. Memory is O(C (L + max_neighbors)).

    A fit takes a float64 matrix of all class distances up to 2,048 classes. Beyond that, single linkage takes memory of
    O(C (D + max_neighbors)) and the time of one or two products of all class means in float32: by faiss where it is
    installed, else by torch. It is exact but for merges and neighbours whose distances differ by less than about 1e-6. The
    other linkages take the matrix for any number of classes.

    Recorded by PML's hook container, 0 until there is something to tell: `d_0`, `nodes_at_level_0` .. `nodes_at_level_L`,
    and `refresh_seconds`, the duration of the last `TreeRefresh`. A fit warns, once, if the samples of each class have all
    but become one point (`d_0` below 1e-4).

    Raises:
        ValueError: `num_levels` or `max_neighbors` below 1, or an unknown linkage.
    """

    labels: torch.Tensor | None
    thresholds: torch.Tensor | None
    spreads: torch.Tensor | None
    average_spread: torch.Tensor | None
    nodes: torch.Tensor | None
    merge_edges: torch.Tensor | None
    merge_heights: torch.Tensor | None
    nearest_classes: torch.Tensor | None

    def __init__(self, num_levels: int = 16, *, linkage: str = "single", max_neighbors: int = 64) -> None:
        super().__init__()
        if linkage not in linkages.LINKAGES:
            raise ValueError(f"linkage must be one of {', '.join(linkages.LINKAGES)}, but it is {linkage!r}")
        self.num_levels = integer_at_least(1, "num_levels", num_levels)
        self.max_neighbors = integer_at_least(1, "max_neighbors", max_neighbors)
        self.linkage = linkage
        # Marks a saved tree as one, so that a foreign file is told from the file of an unfitted tree.
        self.register_buffer("format_version", torch.tensor(FORMAT_VERSION))
        for name in NAMES:
            self.register_buffer(name, None)
        self._buffers = _Unrecorded(self._buffers)
        self._copies = _Unrecorded()  # (name, device): the state where look-ups have needed it
        self._has_warned = False
        self.refresh_seconds = 0.0
        self.__dict__.update(self._derived_from(self._buffers))

    @property
    def is_fitted(self) -> bool:
        """Whether there is a tree yet."""
        return self.labels is not None

    def fit(self, statistics: ClassStatistics, *, device: torch.device | str | None = None) -> ClassTree:
        """Builds the tree from class statistics and returns it; a tree that was there is replaced, or kept on an error.

        Args:
            statistics: of all classes.
            device: where the products of more than 2,048 class means run; default, that of the statistics.

        Raises:
            TypeError: `statistics` is something else.
            ValueError: fewer than two classes, a class without samples, no class with two samples, sums that are not
                finite, or an average spread above 4 (embeddings that were not normalised).
        """
        if not isinstance(statistics, ClassStatistics):
            raise TypeError(f"fit takes ClassStatistics, but got {type(statistics).__name__}; see also fit_embeddings")
        _check_statistics(statistics)
        average_spread = statistics.average_spread.item()
        num_neighbors = min(self.max_neighbors, len(statistics.labels) - 1)
        device = statistics.device if device is None else torch.device(device)
        merges = merge_and_find_nearest(statistics, self.linkage, num_neighbors, device)
        thresholds = linkages.merge_thresholds(average_spread, self.num_levels)
        nodes = linkages.cut_levels(merges.edges, merges.heights, thresholds)
        self._warn_of_collapse(average_spread)
        self._replace(
            {
                "labels": statistics.labels,
                "thresholds": torch.from_numpy(thresholds),
                "spreads": statistics.spreads,
                "average_spread": statistics.average_spread,
                "nodes": torch.from_numpy(nodes),
                "merge_edges": torch.from_numpy(merges.edges),
                "merge_heights": torch.from_numpy(merges.heights),
                "nearest_classes": torch.from_numpy(merges.nearest),
            }
        )
        return self

    def fit_embeddings(self, embeddings: torch.Tensor, labels: Labels) -> ClassTree:
        """`fit` from embeddings (N, D), which are L2-normalised here, and their labels (N,)."""
        labels = label_tensor(labels)
        check_embeddings(embeddings)
        check_lengths(embeddings, labels)
        return self.fit(ClassStatistics(labels, embeddings.shape[1]).update(embeddings, labels))

    def merge_levels(self, a: Labels, b: Labels) -> torch.Tensor:
        """The level at which classes meet: the first where their nodes are equal.

        Args:
            a, b: labels of any shapes that broadcast, such as (B, 1) and (R,).

        Returns:
            int64 of the broadcast shape, 0 .. L; 0 for a class and itself. Memory is that of the result and L + 1 numbers
            for each label given, so (B, 1) and (R,) cost less than two (B, R).
        """
        a_found, b_found = self._positions_of_pairs(a, b)
        nodes = self._on(a_found.device, "nodes")
        return self._meeting_levels(nodes[a_found], nodes[b_found])

    def merge_thresholds(self, a: Labels, b: Labels) -> torch.Tensor:
        """`d_H`, the threshold of the level at which classes meet: float64 squared distances, shapes as `merge_levels`."""
        levels = self.merge_levels(a, b)
        return self._on(levels.device, "thresholds")[levels]

    def cophenetic_distances(self, a: Labels, b: Labels) -> torch.Tensor:
        """The squared distance at which classes merge, whatever the levels: float64, shapes as `merge_levels`.

        With single linkage it is the largest edge on their path in the minimum spanning tree, and `merge_levels` is the
        first level whose threshold lies above it. 0 for a class and itself. Source: `scipy.cluster.hierarchy.cophenet`,
        which lists all pairs; here a table of O(C log C), made once per fit, answers any of them.
        """
        return self._heights_between(*self._positions_of_pairs(a, b))

    def class_spreads(self, labels: Labels) -> torch.Tensor:
        """`s_y` of each label, a float64 squared distance, in the shape of `labels`."""
        found = self._positions(labels)
        return self._on(found.device, "spreads")[found]

    def margin_terms(
        self, a: torch.Tensor, b: torch.Tensor, *, continuous: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`merge_thresholds` of every label of a (A,) with every one of b (B,), and `class_spreads(a)`: (A, B) and (A, 1).

        With `continuous`, `cophenetic_distances` instead of the thresholds. The same numbers in fewer steps, for the miner,
        which needs both in every batch; it is quicker still if b is a.
        """
        a_found = self._positions(a)
        b_found = a_found if b is a else self._positions(b)
        if a_found.ndim != 1 or b_found.ndim != 1:
            raise ValueError(
                f"labels must be of shapes (A,) and (B,), but are {tuple(a_found.shape)} and {tuple(b_found.shape)}"
            )
        spreads = self._on(a_found.device, "spreads")[a_found].unsqueeze(1)
        if continuous:
            return self._heights_between(a_found.unsqueeze(1), b_found), spreads
        nodes = self._on(a_found.device, "nodes")
        levels = self._meeting_levels(nodes[a_found].unsqueeze(1), nodes[b_found])
        return self._on(a_found.device, "thresholds")[levels], spreads

    def neighbors(self, labels: Labels, k: int) -> torch.Tensor:
        """The labels of the k nearest other classes of each class, nearest first.

        Args:
            labels: of any shape.
            k: at most `max_neighbors`, and fewer than there are classes.

        Returns:
            (*labels.shape, k) int64; equally near classes come in no particular order.
        """
        found = self._positions(labels)
        nearest = self._on(found.device, "nearest_classes")
        if integer_at_least(1, "k", k) > nearest.shape[1]:
            raise ValueError(
                f"k is {k}, but this tree of {len(nearest)} classes keeps {nearest.shape[1]} neighbors of each; "
                "see max_neighbors"
            )
        return self._on(found.device, "labels")[nearest[found, :k]]

    def check_labels(self, labels: Labels) -> None:
        """Raises a `ValueError` that names labels which a fitted tree does not know."""
        if self.is_fitted:
            self._positions(labels)

    def to_scipy_linkage(self) -> np.ndarray:
        """The merges as scipy's linkage matrix (C - 1, 4); leaves are class positions, heights squared distances."""
        self._require_fitted()
        return linkages.scipy_linkage(self.merge_edges.cpu().numpy(), self.merge_heights.cpu().numpy())

    def extra_repr(self) -> str:
        """What `repr` shows, as in every torch module."""
        state = f"{len(self.labels)} classes" if self.is_fitted else "not fitted"
        return f"num_levels={self.num_levels}, linkage={self.linkage!r}, {state}"

    # Lookups

    def _require_fitted(self) -> None:
        if not self.is_fitted:
            raise ValueError("the class tree is not fitted yet: call fit or fit_embeddings, or refresh it by TreeRefresh")

    def _on(self, device: torch.device, name: str) -> torch.Tensor:
        """A part of the state on a device, copied there once."""
        value = self._buffers[name]
        if value.device == device:
            return value
        if (name, device) not in self._copies:
            self._copies[name, device] = value.to(device)
        return self._copies[name, device]

    def _positions(self, labels: Labels) -> torch.Tensor:
        self._require_fitted()
        labels = label_tensor(labels)
        return positions(labels, self._on(labels.device, "labels"), "the class tree")

    def _positions_of_pairs(self, a: Labels, b: Labels) -> tuple[torch.Tensor, torch.Tensor]:
        a_found, b_found = self._positions(a), self._positions(b)
        joint_shape(a_found, b_found)
        return a_found, b_found

    def _meeting_levels(self, a_nodes: torch.Tensor, b_nodes: torch.Tensor) -> torch.Tensor:
        # Classes that have met stay together, so the number of levels at which they differ is the level where they meet.
        levels = (a_nodes[..., 0] != b_nodes[..., 0]).long()
        for level in range(1, self._num_divided_levels):
            levels += a_nodes[..., level] != b_nodes[..., level]
        return levels

    def _heights_between(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`cophenetic_distances` of class positions."""
        if ("heights", a.device) not in self._copies:
            tables = lay_out(self.merge_edges.cpu().numpy(), self.merge_heights.cpu().numpy())
            places, maxima = tables[0], maxima_of_runs(tables[1])
            self._copies["heights", a.device] = tuple(torch.from_numpy(table).to(a.device) for table in (places, maxima))
        places, maxima = self._copies["heights", a.device]
        return largest_between(maxima, places[a], places[b])

    # State

    def _replace(self, state: dict[str, torch.Tensor | None]) -> None:
        """Takes over a whole state in one step, so that nothing, not even Ctrl-C, leaves a part of it."""
        device = self.format_version.device
        new = {name: None if value is None else value.detach().to(device) for name, value in state.items()}
        buffers = _Unrecorded({**self._buffers, **new})
        self.__dict__.update(self._derived_from(buffers), _buffers=buffers, _copies=_Unrecorded())

    def _derived_from(self, buffers: _Unrecorded) -> dict[str, Any]:
        """Plain numbers, always there: the records need as many of each, before and after the first fit."""
        average_spread, nodes = buffers["average_spread"], buffers["nodes"]
        counts = [0] * (self.num_levels + 1)
        if nodes is not None:  # a node bears the name of one of its classes
            own_name = torch.arange(len(nodes), device=nodes.device).unsqueeze(1)
            counts = (nodes == own_name).sum(dim=0).tolist()
        numbers_of_nodes = {f"nodes_at_level_{level}": count for level, count in enumerate(counts)}
        return {
            "d_0": 0.0 if average_spread is None else float(average_spread),
            **numbers_of_nodes,
            "_num_divided_levels": sum(count > 1 for count in counts),  # from there on there is one node
            "_record_these": ["d_0", "refresh_seconds", *numbers_of_nodes],
        }

    def _warn_of_collapse(self, average_spread: float) -> None:
        if average_spread < COLLAPSED_SPREAD and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "the embeddings have collapsed: the average squared distance within a class is "
                f"{average_spread:.2g} (at most 4). Lower the learning rate, train longer with the constant margin "
                "(warmup_epochs), or stop earlier",
                stacklevel=3,  # past `fit`
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ClassTree:
        # Follow a change of device, but of no type: half-precision thresholds or float labels would make another tree.
        buffers = _Unrecorded()
        for name, buffer in self._buffers.items():
            moved = None if buffer is None else fn(buffer)
            buffers[name] = moved if moved is None or moved.dtype == buffer.dtype else buffer.to(moved.device)
        self.__dict__.update(_buffers=buffers, _copies=_Unrecorded())
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Checks everything before anything is written; what is wrong is reported the way `load_state_dict` does."""
        saved = {name: state_dict[prefix + name] for name in NAMES if prefix + name in state_dict}
        known = {prefix + name for name in (*NAMES, "format_version")}
        unexpected = [key for key in state_dict if key.startswith(prefix) and key not in known]
        missing = [] if prefix + "format_version" in state_dict else ["format_version"]
        if saved:  # an unfitted tree saves its version alone
            missing += [name for name in NAMES if name not in saved]
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += unexpected
        # The lists also hold what other modules found. Their missing and unexpected keys are no error if the caller is not
        # strict, which torch does not tell here; an error message is one in any case.
        if missing or error_msgs:
            return
        problem = problem_with(state_dict[prefix + "format_version"], saved, self.num_levels, self.labels)
        if problem:
            error_msgs.append(f"class tree {prefix.rstrip('.') or 'itself'}: {problem}; the tree is left as it was")
            return
        self._replace({name: saved[name].clone() if saved else None for name in NAMES})


def _check_statistics(statistics: ClassStatistics) -> None:
    labels, counts = statistics.labels, statistics.counts
    if len(labels) < 2:
        raise ValueError(f"a class tree needs at least two classes, but the data set has one, {name_some(labels)}")
    if (counts == 0).any():
        raise ValueError(f"there are no samples of {name_some(labels[counts == 0])}; a class tree needs some of every class")
    if not (counts > 1).any():
        raise ValueError("every class has a single sample; the average spread needs at least one class with two")
    if not statistics.is_finite():
        raise ValueError("the class statistics hold NaN or infinite values; the tree is left as it was")
    if statistics.average_spread > linkages.MAX_SQUARED_DISTANCE * (1 + 1e-6):
        raise ValueError(
            f"the average spread is {statistics.average_spread:.4g}, but squared distances of normalised embeddings "
            "are at most 4; normalise the embeddings"
        )
