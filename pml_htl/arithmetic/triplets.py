"""Which pairs and triplets of a batch there are: by the labels, or by an `indices_tuple` of PML.

An anchor's triplets are all its positives with all its negatives. So two B x R matrices say it all, and a list of triplets
is made only for what needs each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from ..common.transforms import is_batched

Triplets: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
PairTuple: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Mined: TypeAlias = Triplets | PairTuple
Rows: TypeAlias = slice | torch.Tensor  # some anchors, as a range or (b,) int64


FAR = 1e20  # a distance beyond all others; unlike infinity it can be multiplied by zero, and divided by a temperature


class Positives(NamedTuple):
    """The positives of anchors side by side, (B, t) for the most that one has or 1; a free place is at -FAR and weighs 0.

    columns: int64, which of the R samples. distances. weights: how often each counts, of the distances' type; None if no
    place is free and each counts once.
    """

    columns: torch.Tensor
    distances: torch.Tensor
    weights: torch.Tensor | None

    def take(self, rows: Rows, most: int | None) -> Positives:
        """The first `most` places of some rows."""
        weights = None if self.weights is None else self.weights[rows, :most]
        return Positives(self.columns[rows, :most], self.distances[rows, :most], weights)


class Pairs(NamedTuple):
    """Which pairs stand in triplets: each positive pair of an anchor with each negative pair of the same anchor.

    positives, negatives: (B, R) bool, or int64 where pairs count more than once.
    num_positives, num_negatives: (B,) int64, of each anchor.
    most_positives: different ones of one anchor, at least 1; None if that is not known without waiting for the device.

    The methods take `margins` (B, R).
    """

    positives: torch.Tensor
    negatives: torch.Tensor
    num_positives: torch.Tensor
    num_negatives: torch.Tensor
    most_positives: int | None

    @property
    def count_once(self) -> bool:
        """Whether no pair counts more than once."""
        return self.positives.dtype == self.negatives.dtype == torch.bool

    @property
    def are_alike(self) -> bool:
        """Whether all anchors are known to have as many positives."""
        return False

    def num_triplets(self) -> torch.Tensor:
        """How many there are, an int64 scalar."""
        return (self.num_positives * self.num_negatives).sum()

    def positives_of(self, distances: torch.Tensor) -> Positives:
        """The positives by distances (B, R); t is R where it is not known, so that no shape depends on the data."""
        if self.most_positives is None:
            columns = torch.arange(distances.shape[1], device=distances.device).expand(distances.shape)
            return Positives(columns, distances.where(self.positives > 0, -FAR), self.positives.to(distances.dtype))
        numbers = self.positives.bool().sum(dim=1, keepdim=True, dtype=torch.int32)
        taken = torch.arange(self.most_positives, device=numbers.device) < numbers
        columns = torch.zeros_like(taken, dtype=torch.int64).masked_scatter_(taken, self.positives.nonzero()[:, 1])
        weights = self.positives.gather(1, columns).to(distances.dtype) * taken
        return Positives(columns, distances.gather(1, columns).where(taken, -FAR), weights)

    def needed(self, distances: torch.Tensor, margins: torch.Tensor) -> Callable[[Rows], torch.Tensor]:
        """What a positive must exceed to violate the margin of a negative, FAR where there is none: (b, R) of b rows."""
        return lambda rows: (distances[rows] - margins[rows]).where(self.negatives[rows] > 0, FAR)

    def times(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor | None:
        """How often each negative counts, of some rows (b, R); None if all pairs count once."""
        return None if self.count_once else self.negatives[rows].to(dtype)

    def listed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Anchor and positive of all positive pairs whose anchor has a negative, (P,) int64 each."""
        anchors, positives = torch.where((self.positives > 0) & (self.num_negatives > 0).unsqueeze(1))
        if self.positives.dtype == torch.bool:
            return anchors, positives
        times = self.positives[anchors, positives]
        return anchors.repeat_interleave(times), positives.repeat_interleave(times)

    def mean_margin(self, margins: torch.Tensor) -> torch.Tensor:
        """The mean margin of all triplets, a scalar; NaN without any."""
        counted = margins.where(self.negatives, 0) if self.negatives.dtype == torch.bool else margins * self.negatives
        return (counted.sum(dim=1) * self.num_positives).sum() / self.num_triplets()

    def margin_range(self, margins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest margin of a triplet, scalars; zeros without any."""
        there = margins[(self.negatives > 0) & (self.positives > 0).any(dim=1, keepdim=True)]
        return torch.aminmax(there) if len(there) else (there.sum(), there.sum())


def pairs_of_labels(labels: torch.Tensor, ref_labels: torch.Tensor) -> Pairs:
    """All pairs of a batch; a sample is no positive of itself (`ref_labels is labels`)."""
    matches = labels.unsqueeze(1) == ref_labels
    differs = ~matches
    num_matches = matches.sum(dim=1, dtype=torch.int32).long()  # as int32, which is many times faster
    num_differs = len(ref_labels) - num_matches
    if ref_labels is labels:
        matches.fill_diagonal_(False)
        num_matches -= 1
    return Pairs(matches, differs, num_matches, num_differs, _most(num_matches))


def pairs_of_tuple(indices_tuple: PairTuple, num_anchors: int, num_refs: int) -> Pairs:
    """The pairs of a tuple (anchors, positives, anchors, negatives), each as often as it is there."""
    a1, positives, a2, negatives = indices_tuple
    positive_counts = _count_pairs(a1, positives, num_anchors, num_refs)
    negative_counts = _count_pairs(a2, negatives, num_anchors, num_refs)
    num_positives, num_negatives = (torch.bincount(anchors, minlength=num_anchors) for anchors in (a1, a2))
    most_positives = _most((positive_counts > 0).sum(dim=1))
    return Pairs(positive_counts, negative_counts, num_positives, num_negatives, most_positives)


def all_triplets(labels: torch.Tensor, ref_labels: torch.Tensor) -> Triplets:
    """Every (anchor, positive, negative), int64, in the order of PML's `get_all_triplets_indices`."""
    pairs = pairs_of_labels(labels, ref_labels)
    return triplets_where(pairs.positives, lambda anchors, _: pairs.negatives[anchors])


def triplets_of_tuple(indices_tuple: PairTuple) -> Triplets:
    """The triplets of a pair tuple in the order of PML's `convert_to_triplets`, in the memory that they take."""
    a1, positives, a2, negatives = indices_tuple
    num_anchors = int(max(a1.max(), a2.max())) + 1 if len(a1) and len(a2) else 0
    by_anchor = a2.argsort(stable=True)
    num_negatives = torch.bincount(a2, minlength=num_anchors)
    first = num_negatives.cumsum(0) - num_negatives  # of each anchor, in `by_anchor`
    repeats = num_negatives[a1] if num_anchors else torch.zeros_like(a1)
    pair = torch.repeat_interleave(repeats)
    place = torch.arange(len(pair), device=pair.device) - (repeats.cumsum(0) - repeats)[pair]
    return a1[pair], positives[pair], negatives[by_anchor[first[a1[pair]] + place]]


def triplets_where(matches: torch.Tensor, negatives: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Triplets:
    """The triplets of the positive pairs in `matches` (B, R), in the order anchor, positive, negative.

    `negatives(anchors, positives)` says for P pairs which of the R samples are their negatives: (P, R) bool. It is asked
    for B / 2 pairs at a time, so that memory stays at B x R and four thirds of what is returned.
    """
    pairs = torch.where(matches)
    found: list[list[torch.Tensor]] = [[], [], []]
    for anchors, positives in zip(*(index.split(max(1, len(matches) // 2)) for index in pairs), strict=True):
        pair, negative = torch.where(negatives(anchors, positives))
        for parts, index in zip(found, (anchors[pair], positives[pair], negative.clone()), strict=True):  # a view of both
            parts.append(index)
    # Joined one by one, so that the parts of each go before the next is made.
    anchor, positive, negative = (_joined(parts) for parts in found)
    return anchor, positive, negative


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    whole = torch.cat(parts)
    parts.clear()
    return whole


def _most(numbers: torch.Tensor) -> int | None:
    """The largest, at least 1, where looking is free."""
    if numbers.device.type != "cpu" or is_batched(numbers):
        return None
    return max(1, int(numbers.max())) if len(numbers) else 1


def _count_pairs(anchors: torch.Tensor, others: torch.Tensor, num_anchors: int, num_refs: int) -> torch.Tensor:
    """(B, R) how often each pair is there: bool if at most once, else int64."""
    counts = torch.bincount(anchors * num_refs + others, minlength=num_anchors * num_refs).view(num_anchors, num_refs)
    return counts.bool() if counts.numel() == 0 or counts.max() <= 1 else counts
