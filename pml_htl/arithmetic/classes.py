"""A batch by its classes: samples of a class share their negatives and their margins, so that no B x B mask is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .triplets import FAR, Positives, Rows


class Classes(NamedTuple):
    """The K classes of a batch: their labels (K,), sorted; which of them each sample is of (B,); and their sizes (K,)."""

    labels: torch.Tensor
    of_each: torch.Tensor
    sizes: torch.Tensor


def classes_of(labels: torch.Tensor) -> Classes:
    """The classes of labels (B,) on the CPU; elsewhere everyone would wait for their number."""
    return Classes(*labels.unique(return_inverse=True, return_counts=True))


class ClassPairs(NamedTuple):
    """All pairs of a batch, as `Pairs`, each sample with all others: positives are of the same class, negatives of another.

    columns: (B, t) int64, the positives of each anchor, ascending; taken: (B, t) bool, which of these places are, or None if
    all are.
    num_positives, num_negatives: (B,) int64. most_positives: t, at least 1.

    The methods take `margins` (K, K), those of the classes.
    """

    classes: Classes
    columns: torch.Tensor
    taken: torch.Tensor | None
    num_positives: torch.Tensor
    num_negatives: torch.Tensor
    most_positives: int

    @property
    def count_once(self) -> bool:
        """Whether no pair counts more than once."""
        return True

    @property
    def are_alike(self) -> bool:
        """Whether all anchors have as many positives."""
        return self.taken is None

    def num_triplets(self) -> torch.Tensor:
        """How many there are, an int64 scalar."""
        return (self.num_positives * self.num_negatives).sum()

    def positives_of(self, distances: torch.Tensor) -> Positives:
        """The positives by distances (B, B)."""
        found = distances.gather(1, self.columns)
        if self.taken is None:
            return Positives(self.columns, found, None)
        return Positives(self.columns, found.where(self.taken, -FAR), self.taken.to(found.dtype))

    def needed(self, distances: torch.Tensor, margins: torch.Tensor) -> Callable[[Rows], torch.Tensor]:
        """What a positive must exceed to violate the margin of a negative, FAR where there is none: (b, B) of b rows."""
        of_each = self.classes.of_each
        by_class = margins.clone().fill_diagonal_(-FAR).index_select(1, of_each)
        return lambda rows: distances[rows] - by_class[of_each[rows]]

    def times(self, rows: Rows, dtype: torch.dtype) -> None:
        """All pairs count once."""
        return None

    def listed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Anchor and positive of all positive pairs whose anchor has a negative, (P,) int64 each."""
        if len(self.classes.labels) < 2:
            return (self.columns.new_empty(0),) * 2
        columns = self.columns.flatten() if self.taken is None else self.columns[self.taken]
        return torch.arange(len(self.columns)).repeat_interleave(self.num_positives), columns

    def mean_margin(self, margins: torch.Tensor) -> torch.Tensor:
        """The mean margin of all triplets, a scalar; NaN without any."""
        sizes = self.classes.sizes.to(margins.dtype)
        of_anchors = margins.clone().fill_diagonal_(0) @ sizes
        return (sizes * (sizes - 1) * of_anchors).sum() / self.num_triplets()

    def margin_range(self, margins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest margin of a triplet, scalars; zeros without any."""
        others = ~torch.eye(len(margins), dtype=torch.bool)
        there = margins[others & (self.classes.sizes > 1).unsqueeze(1)]
        return torch.aminmax(there) if len(there) else (there.sum(), there.sum())


def pairs_of_classes(classes: Classes) -> ClassPairs:
    """All pairs of a batch with these classes."""
    of_each, sizes = classes.of_each, classes.sizes
    num_positives = sizes[of_each] - 1
    largest = max(2, int(sizes.max())) if len(sizes) else 2
    # Samples sorted by class: those of class c begin at starts[c]. An anchor passes over its own place.
    order = of_each.argsort(stable=True)
    starts, others = sizes.cumsum(0) - sizes, torch.arange(largest - 1)
    places = starts[of_each].unsqueeze(1) + others
    places += places >= order.argsort().unsqueeze(1)
    taken = None
    if largest * len(sizes) > len(of_each):  # some are smaller
        taken = others < num_positives.unsqueeze(1)
        places.clamp_(max=len(of_each) - 1)
    num_negatives = len(of_each) - 1 - num_positives
    return ClassPairs(classes, order[places], taken, num_positives, num_negatives, largest - 1)
