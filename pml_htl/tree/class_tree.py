"""The class tree: which classes merge at which of L + 1 thresholds (method, section 2)."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from ..common.batches import check_embeddings, check_lengths, joint_shape
from ..common.labels import SAME_LABELS, Labels, find, integer_at_least, label_tensor, positions
from ..common.precision import copy_for, home_of
from ..common.transforms import outside_transforms
from ..common.warn import warn_of_collapse
from ..distributed import Ranks
from . import given as hierarchies
from . import linkage as linkages
from .confusion import COLUMNS, confusable_pairs
from .cophenetic import largest_between, lay_out, levels_between, maxima_of_runs
from .given import Numbers
from .merging import check_statistics, merge_and_find_nearest
from .state import NAMES, SHAPE_NAMES, all_labels_of, problem_with, read_entries, shape_of, version_of, with_spreads
from .statistics import ClassStatistics

FIT = "the fit of the class tree"
ADVICE = f"{SAME_LABELS} (for a validation loss on other classes, put the loss into eval mode)"
BITS = {torch.float64: torch.int64, torch.float32: torch.int32}  # of the types that a tree has
Key = TypeVar("Key")
Value = TypeVar("Value")


class _Unrecorded(UserDict[Key, Value]):
    """A mapping that is no dict. PML's hook container records whatever dicts it finds in a loss, tables and all."""


class ClassTree(torch.nn.Module):
    """Hierarchical class tree over squared distances between classes.

    Two classes whose mean squared distance lies below `d_l = d_0 + l (4 - d_0) / L` stand in the same node at level l
    (transitively: single linkage); at level L all do. Source: HTL (Ge et al., ECCV 2018), section 3.1.

    One tree is shared: the sampler asks it for near classes, the miner for the margins of class pairs. Build it from
    statistics (`fit`), from embeddings (`fit_embeddings`) or, in training, by `TreeRefresh`.

    The hierarchy can also be given, by `from_distances` or `from_taxonomy`. Every fit then keeps its merges and nearest
    classes, and takes only spreads, `d_0` and so the thresholds from the embeddings. Before the first (if no spreads were
    given) such a tree is not fitted, and margins are the initial ones; but `neighbors` and the sampler have its classes.

    Args:
        num_levels: L, 16 in the paper.
        linkage: "single" (the paper's), or "average" or "complete" for comparison.
        max_neighbors: how many nearest classes of each class are kept for `neighbors`.

    Attributes (buffers, None while the tree is not fitted, but for a given hierarchy; `part(name)` gives one of them and
    raises where it is None; distances are squared):
        labels: (C,) int64, the sorted labels of the classes.
        thresholds: (L + 1,) float64, `d_0 .. d_L`.
        spreads: (C,) float64, `s_c`; a class with one sample has the average spread.
        average_spread: float64 scalar, `d_0`.
        nodes: (C, L + 1) int64, the node of each class at each level, named by its smallest class position.
        merge_edges, merge_heights: (C - 1, 2) int64 and (C - 1,) float64, the merges in ascending order as pairs of class
            positions; with single linkage the edges of the minimum spanning tree and their lengths.
        nearest_classes: (C, min(max_neighbors, C - 1)) int64, positions of the nearest other classes, nearest first.
        given_heights, taxonomy_height: (C - 1,) float64 and int64 scalar H, of a given hierarchy alone: where each merge is,
            1 .. H levels up, or, with H = 0, the squared distance.
        waiting: (W,) int64, the sorted labels of classes that have had no samples yet (`fit(partial=True)`), or None. They
            belong to the data set, but not to the tree: look-ups refuse them, their margins are the initial one, and the
            sampler gives them random neighbours. `all_labels` has both.
        nearest_distances: float32 of the shape of `nearest_classes`, or None: in a taxonomy, and in a tree that an earlier
            version saved.

    The state travels in `state_dict()`, also into an unfitted tree, and is replaced as a whole or not at all; a tree with a
    given hierarchy takes no state of a tree without. `.to(device)` moves it; `.half()`, `.double()` and the like leave its
    types as they are. Look-ups for labels on another device use a copy there, made once per fit. On a device without float64
    (MPS, many Intel GPUs) look-ups give float32, right to about 1e-7 of the largest number; a tree that moves there keeps
    its float64 tables on the host, so that `state_dict()` loses no digit. Memory is O(C (L + max_neighbors)).

    A fit takes a float64 matrix of all class distances up to 2,048 classes. Beyond that, single linkage takes memory of
    O(C (D + max_neighbors)) and, on a CPU, the time of about one product of all class means in float32 by torch, less where
    groups of classes are far from each other, and of choosing the nearest from it. It is exact but for merges and neighbours
    whose distances differ by less than about 1e-6. The other linkages take the matrix for any number of classes.

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
    given_heights: torch.Tensor | None
    taxonomy_height: torch.Tensor | None
    waiting: torch.Tensor | None
    nearest_distances: torch.Tensor | None
    format_version: torch.Tensor
    num_levels: int
    max_neighbors: int
    linkage: str
    refresh_seconds: float
    d_0: float
    _num_divided_levels: int
    _copies: _Unrecorded[tuple[str, torch.device], torch.Tensor]

    def __init__(self, num_levels: int = 16, *, linkage: str = "single", max_neighbors: int = 64) -> None:
        super().__init__()
        if linkage not in linkages.LINKAGES:
            raise ValueError(f"linkage must be one of {', '.join(linkages.LINKAGES)}, but it is {linkage!r}")
        self.num_levels = integer_at_least(1, "num_levels", num_levels)
        self.max_neighbors = integer_at_least(1, "max_neighbors", max_neighbors)
        self.linkage = linkage
        # Marks a saved tree as one, so that a foreign file is told from the file of an unfitted tree.
        self.register_buffer("format_version", torch.tensor(version_of({})))
        for name in NAMES:
            self.register_buffer(name, None)
        self._copies = _Unrecorded()  # (name, device): the state where look-ups have needed it
        self._has_warned = False
        self.refresh_seconds = 0.0
        self.__dict__.update(self._derived_from(self._buffers), _buffers=_Unrecorded(self._buffers))

    @property
    def is_fitted(self) -> bool:
        """Whether there is a tree yet, with spreads and thresholds."""
        return self.thresholds is not None

    @property
    def is_given(self) -> bool:
        """Whether the hierarchy was given, by `from_distances` or `from_taxonomy`, so that every fit keeps it."""
        return self.given_heights is not None

    @property
    def all_labels(self) -> torch.Tensor | None:
        """The sorted labels of all classes (C + W,), also of those that wait; None while the tree has no classes."""
        return all_labels_of(self._buffers)

    @classmethod
    def from_distances(
        cls,
        labels: Labels,
        squared_distances: Numbers,
        *,
        spreads: Numbers | None = None,
        num_levels: int = 16,
        linkage: str = "single",
        max_neighbors: int = 64,
        seed: int = 0,
    ) -> ClassTree:
        """A given hierarchy by class distances of one's own, such as those of a teacher network; merges stay where they are.

        Args:
            labels: (C,) the distinct labels of all classes, in any order.
            squared_distances: (C, C) in the order of `labels`, symmetric, in [0, 4], the scale of the embeddings; the
                diagonal does not count.
            spreads: (C,) `s_c`, likewise; with them, and their mean as `d_0`, the tree is fitted at once.
            num_levels, linkage, max_neighbors: as for any tree.
            seed: of the order of equally near classes, which is another one for each class.

        Raises:
            ValueError: fewer than two labels, or one twice; values of other shapes, outside [0, 4] or not finite, or a
                matrix that is not symmetric (by more than 1e-5, which rounding explains).
            TypeError: labels that are not integers, or values that are not numbers.
        """
        tree = cls(num_levels, linkage=linkage, max_neighbors=max_neighbors)
        known, order = hierarchies.sort_classes(labels)
        distances = hierarchies.check_distances(squared_distances, known, order)
        merges = hierarchies.merges_of_distances(distances, linkage, min(tree.max_neighbors, len(known) - 1), seed)
        state = shape_of(known, merges, taxonomy_height=0)
        if spreads is not None:
            own = hierarchies.check_spreads(spreads, known, order)
            state = with_spreads(state, own, own.mean(), tree.num_levels)
        return tree._replace(state)

    @classmethod
    def from_taxonomy(
        cls, labels: Labels, ancestors: Labels, *, num_levels: int | None = None, max_neighbors: int = 64, seed: int = 0
    ) -> ClassTree:
        """A given hierarchy by a taxonomy, such as genus, family and order of species.

        Classes whose lowest common ancestor is h levels up merge at the squared distance `d_0 + (h / H) (4 - d_0)`, and
        meet at level `ceil(h L / H)`: with L = H at level h, whose threshold is that very distance. Nearest classes are
        those that meet lowest. No C x C matrix: memory is O(C (H + L + max_neighbors)).

        Args:
            labels: (C,) the distinct labels of all classes, in any order.
            ancestors: (C, H) integers, the ancestor of each class 1, 2, .. H levels up; the last is the root of all.
                Equal numbers in one column are one ancestor; those of different columns have nothing to do with each other.
            num_levels: L; default H.
            max_neighbors: as for any tree.
            seed: of the order of classes that meet equally low, which is another one for each class.

        Raises:
            ValueError: fewer than two labels, or one twice; ancestors of another shape, without a common root, or not
                nested: two classes, which are named, that have an ancestor in common and different ones above it.
            TypeError: labels or ancestors that are not integers.
        """
        known, order = hierarchies.sort_classes(labels)
        table = hierarchies.check_ancestors(ancestors, known, order)
        tree = cls(table.shape[1] if num_levels is None else num_levels, max_neighbors=max_neighbors)
        merges = hierarchies.merges_of_taxonomy(table, min(tree.max_neighbors, len(known) - 1), seed)
        return tree._replace(shape_of(known, merges, taxonomy_height=table.shape[1]))

    def fit(
        self,
        statistics: ClassStatistics,
        *,
        partial: bool = False,
        device: torch.device | str | None = None,
        ranks: Ranks | None = None,
    ) -> ClassTree:
        """Builds the tree from class statistics and returns it; a tree that was there is replaced, or kept on an error.

        Args:
            statistics: of all classes. A given hierarchy stays as it is, and takes spreads and thresholds from them.
            partial: build it from the classes that have samples, if some have none yet; these are `waiting` until a later
                fit. In a given hierarchy all classes have their place, and those without samples get the average spread.
            device: where the products of more than 2,048 class means run; default, that of the statistics.
            ranks: processes that share these products, `pml_htl.distributed.Ranks(group)`. All must call `fit`, with the
                same statistics; all end with the same tree, that of rank 0, or with an error. Default, this one alone.

        Raises:
            TypeError: `statistics` is something else.
            ValueError: fewer than two classes, a class without samples (with `partial`: fewer than two classes with some),
                no class with two samples, sums that are not
                finite, an average spread above 4 (embeddings that were not normalised), or other classes than those of a
                given hierarchy.
            RuntimeError: another of the ranks has failed.
        """
        ranks = Ranks.alone() if ranks is None else ranks
        with ranks.together(FIT):
            if not isinstance(statistics, ClassStatistics):
                raise TypeError(f"fit takes ClassStatistics, but got {type(statistics).__name__}; see also fit_embeddings")
            if self.is_given:
                hierarchies.check_same_classes(statistics.labels, self.part("labels"))
            check_statistics(statistics, partial)
            waiting = None
            if not self.is_given and (statistics.counts == 0).any():
                waiting = statistics.labels[statistics.counts == 0]
                statistics = statistics.of_classes_with_samples()
        shape = self._shape_for(statistics, device, ranks)
        with ranks.together(FIT):
            spreads = statistics.spreads
            spreads = spreads.where(~spreads.isnan(), statistics.average_spread)  # of a given hierarchy's, without samples
            state = shape and with_spreads(shape, spreads, statistics.average_spread, self.num_levels)
            if state is not None and waiting is not None:
                state["waiting"] = waiting
            self._has_warned = self._has_warned or warn_of_collapse(statistics.average_spread.item())
        return self._replace(ranks.broadcast(state))

    def _shape_for(
        self, statistics: ClassStatistics, device: torch.device | str | None, ranks: Ranks
    ) -> dict[str, torch.Tensor] | None:
        """The given hierarchy, or that of the statistics; of several ranks on the first alone."""
        if self.is_given:
            names = () if ranks.rank else (*SHAPE_NAMES, "nearest_distances")
            return {name: value for name in names if (value := self._buffers[name]) is not None} or None
        num_neighbors = min(self.max_neighbors, len(statistics.labels) - 1)
        device = statistics.device if device is None else torch.device(device)
        merges = merge_and_find_nearest(statistics, self.linkage, num_neighbors, device, ranks)
        return None if merges is None else shape_of(statistics.labels, merges)

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
        first level whose threshold lies above it (in a taxonomy: does not lie below it). 0 for a class and itself. Source:
        `scipy.cluster.hierarchy.cophenet`, which lists all pairs; here a table of O(C log C), made once per fit, answers
        any of them.
        """
        return self._heights_between(*self._positions_of_pairs(a, b))

    def class_spreads(self, labels: Labels) -> torch.Tensor:
        """`s_y` of each label, a float64 squared distance, in the shape of `labels`."""
        found = self._positions(labels)
        return self._on(found.device, "spreads")[found]

    def margin_terms(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`merge_thresholds` of every label of a (A,) with every one of b (B,), and `class_spreads(a)`: (A, B) and (A, 1).

        The same numbers in fewer steps, for the miner, which needs both in every batch; it is quicker still if b is a.
        """
        a_found = self._positions(a)
        b_found = a_found if b is a else self._positions(b)
        if a_found.ndim != 1 or b_found.ndim != 1:
            raise ValueError(
                f"labels must be of shapes (A,) and (B,), but are {tuple(a_found.shape)} and {tuple(b_found.shape)}"
            )
        spreads = self._on(a_found.device, "spreads")[a_found].unsqueeze(1)
        nodes = self._on(a_found.device, "nodes")
        a_nodes = nodes[a_found, : self._num_divided_levels]
        b_nodes = a_nodes if b is a else nodes[b_found, : self._num_divided_levels]
        return self._on(a_found.device, "thresholds")[levels_between(a_nodes, b_nodes)], spreads

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

    def confusable(self, k: int = 20) -> np.ndarray:
        """The k pairs of classes that the embeddings tell apart least, most suspicious first.

        Such pairs are duplicates, variants of one thing, one class under two names, or merely alike. They come from the
        lists of nearest classes: of a pair that is missing, both have `max_neighbors` classes that are nearer.

        Returns:
            At most k pairs, each once: a structured array, of which `pandas.DataFrame(...)` makes a frame. Its columns:
            label_a, label_b: the smaller label first.
            ratio: the distance over the mean of both spreads, by which pairs are sorted. Two halves of one class have about
                1; it grows with the squared distance of the means over the sum of the variances. It tells that the classes
                are not told apart, not why.
            distance: the mean squared distance between the samples of one and of the other, right to about 1e-6; in a
                taxonomy that of their merge.
            spread_a, spread_b: the mean squared distance between the samples of each; of a class with one sample the mean.
            level: at which they meet in the tree, 0 .. L.

        O(C max_neighbors) time and memory.

        Raises:
            ValueError: the tree is not fitted, or was saved by a version that kept no distances; k below 1.
        """
        k = integer_at_least(1, "k", k)
        spreads, labels, nearest = (self.part(name).cpu() for name in ("spreads", "labels", "nearest_classes"))
        if self.nearest_distances is not None:
            distances = self.nearest_distances.cpu().double()
        elif self.is_given:
            distances = self.cophenetic_distances(labels.unsqueeze(1), labels[nearest])
        else:
            raise ValueError("this tree was saved by an earlier version, without distances; fit or refresh it again")
        pairs, ratios, places = confusable_pairs(nearest.numpy(), distances.numpy(), spreads.numpy(), k)
        table = np.empty(len(pairs), dtype=COLUMNS)
        for letter, positions_of in zip("ab", torch.from_numpy(pairs).T, strict=True):
            table[f"label_{letter}"], table[f"spread_{letter}"] = labels[positions_of], spreads[positions_of]
        table["ratio"], table["distance"] = ratios, distances.flatten()[torch.from_numpy(places)]
        table["level"] = self.merge_levels(*labels[torch.from_numpy(pairs)].T)
        return table

    def groups(self, level: int) -> list[torch.Tensor]:
        """The labels of the classes in each node of a level, 0 .. L: sorted int64 on the host, by their smallest.

        Raises:
            ValueError: the tree is not fitted, or has no such level.
        """
        level = integer_at_least(0, "level", level)
        nodes = self.part("nodes").cpu()
        if level > self.num_levels:
            raise ValueError(f"level is {level}, but this tree has levels 0 to {self.num_levels}")
        order = nodes[:, level].argsort(stable=True)
        sizes = nodes[order, level].unique_consecutive(return_counts=True)[1]
        return list(self.part("labels").cpu()[order].split(sizes.tolist()))

    def replace_unknown(self, labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
        """The labels, those that the tree does not know replaced by one that it knows, and which it knows: two of one shape.

        For look-ups of which the caller uses only what is known. No device is waited for.
        """
        labels = label_tensor(labels)
        classes = self._on(labels.device, "labels")
        known = find(labels, classes)[1]
        return labels.where(known, classes[0]), known

    def part(self, name: str) -> torch.Tensor:
        """An attribute of the state by its name, for what needs it: where it is None, a `ValueError` says so."""
        value = self._buffers[name]
        if value is None:
            raise ValueError("the class tree is not fitted yet: call fit or fit_embeddings, or refresh it by TreeRefresh")
        return value

    def check_labels(self, labels: Labels) -> None:
        """Raises a `ValueError` that names labels which are not among `all_labels`, once the tree has classes."""
        if self.labels is not None:
            labels = label_tensor(labels)
            positions(labels, self._on(labels.device, "all_labels"), "the class tree", ADVICE)

    def to_scipy_linkage(self) -> np.ndarray:
        """The merges as scipy's linkage matrix (C - 1, 4); leaves are class positions, heights squared distances."""
        edges, heights = self.part("merge_edges"), self.part("merge_heights")
        return linkages.scipy_linkage(edges.cpu().numpy(), heights.cpu().numpy())

    def extra_repr(self) -> str:
        """What `repr` shows, as in every torch module."""
        state = f"{len(self.part('labels'))} classes" if self.is_fitted else "not fitted"
        given = ", given hierarchy" if self.is_given else ""
        waiting = "" if self.waiting is None else f", {len(self.waiting)} more without samples yet"
        return f"num_levels={self.num_levels}, linkage={self.linkage!r}{given}, {state}{waiting}"

    # Lookups

    def _on(self, device: torch.device, name: str) -> torch.Tensor:
        """A part of the state, or `all_labels`, on a device, copied there once, as float32 where there is no float64."""
        if name == "all_labels" and self.waiting is None:
            name = "labels"
        if name != "all_labels" and self.part(name).device == device:
            return self.part(name)
        if (name, device) not in self._copies:
            with outside_transforms():
                value = all_labels_of(self._buffers) if name == "all_labels" else self.part(name)
                assert value is not None
                self._copies[name, device] = copy_for(device, value)
        return self._copies[name, device]

    def _positions(self, labels: Labels) -> torch.Tensor:
        self.part("labels")  # the first thing to say is that there are none
        labels = label_tensor(labels)
        advice = ADVICE
        if self.waiting is not None:
            advice = f"{len(self.waiting)} more classes have had no samples yet (see `waiting`); else {ADVICE}"
        return positions(labels, self._on(labels.device, "labels"), "the class tree", advice)

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
        heights = self.part("merge_heights")
        if ("maxima", a.device) not in self._copies:
            with outside_transforms():
                row, gaps = lay_out(self.part("merge_edges").cpu().numpy(), heights.cpu().numpy())
                self._copies["places", a.device] = torch.from_numpy(row).to(a.device)
                self._copies["maxima", a.device] = copy_for(a.device, torch.from_numpy(maxima_of_runs(gaps)))
        places, maxima = self._copies["places", a.device], self._copies["maxima", a.device]
        return largest_between(maxima, places[a], places[b])

    # State

    def _replace(self, state: dict[str, torch.Tensor]) -> ClassTree:
        """Takes over a whole state, of which the rest is None, and returns itself.

        All in one step, so that nothing, not even Ctrl-C, leaves a part of it.
        """
        device, state = self.format_version.device, {**state, "format_version": torch.tensor(version_of(state))}
        moved = {name: value.detach().to(home_of(value.dtype, device)) for name, value in state.items()}
        buffers: _Unrecorded[str, torch.Tensor | None] = _Unrecorded({**dict.fromkeys(NAMES), **moved})
        self.__dict__.update(self._derived_from(buffers), _buffers=buffers, _copies=_Unrecorded())
        return self

    def _derived_from(self, buffers: Mapping[str, torch.Tensor | None]) -> dict[str, Any]:
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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ClassTree:
        # Follow a change of device, but of no type: half-precision thresholds or float labels would make another tree.
        buffers, device = _Unrecorded(self._buffers), fn(self.format_version).device
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            home = home_of(buffer.dtype, device)
            if home != device:
                buffers[name] = buffer.to(home)
                continue
            # As integers, which `half()` and `double()` leave alone: a device may lack the type.
            bits = buffer.view(BITS[buffer.dtype]) if buffer.is_floating_point() else buffer
            moved = fn(bits)
            buffers[name] = moved.view(buffer.dtype) if moved.dtype == bits.dtype else buffer.to(moved.device)
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
        saved, missing, unexpected = read_entries(state_dict, prefix)
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += [prefix + name for name in unexpected]
        # The lists also hold what other modules found. Their missing and unexpected keys are no error if the caller is not
        # strict, which torch does not tell here; an error message is one in any case.
        if missing or error_msgs:
            return
        version = state_dict[prefix + "format_version"]
        problem = problem_with(version, saved, self.num_levels, self.all_labels, self.is_given)
        if problem:
            error_msgs.append(f"class tree {prefix.rstrip('.') or 'itself'}: {problem}; the tree is left as it was")
            return
        self._replace({name: value.clone() for name, value in saved.items()})
