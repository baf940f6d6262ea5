"""All parts of Hierarchical Triplet Loss, made and wired in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from ._pml import LpDistance
from .common.labels import Labels, integer_at_least
from .hooks import TreeRefresh
from .losses import HierarchicalTripletLoss
from .miners import DynamicMarginMiner
from .samplers import AnchorNeighborSampler
from .tree import ClassTree

BATCH_SIZE = 128
NEIGHBORHOOD_SIZE = 4
SAMPLES_PER_CLASS = 4


class _Form(NamedTuple):
    """What a form of the method sets: the power of the distance, and the temperature of the loss."""

    power: int
    temperature: float | None


FORMS = {"recommended": _Form(power=1, temperature=0.05), "paper": _Form(power=2, temperature=None)}


class HTL:
    """A class tree with its sampler, miner and loss.

    Args:
        labels: (N,) the label of every training sample, as sampler and loss see them (after any mapping).
        batch_size: samples in a batch, of all processes together; 128 unless the counts below say otherwise.
        form: "recommended", plain distances and a smooth maximum over the negatives (`temperature=0.05`); or "paper",
            squared distances and max(0, .) of each triplet, the method as published. `distance` and `temperature` override
            it. benchmarks/README.md has what each is worth.
        num_anchors, neighborhood_size, samples_per_class: the batch: so many anchor classes, each with its neighbourhood of
            so many classes (itself counted), so many samples of each. A neighbourhood has 4 classes and a class 4 samples,
            unless given, and `batch_size` decides on what is left. At least two classes, and two samples of each, so that
            there are triplets. See `AnchorNeighborSampler`.
        num_levels, linkage: of the tree, 16 and "single" by default. See `ClassTree`.
        tree: instead, a tree of one's own with its own settings, such as `ClassTree.from_taxonomy(...)`. Its `max_neighbors`
            should be at least `num_anchors * neighborhood_size - 1`: any neighbour may be taken by the other classes of a
            batch.
        beta, initial_margin, dynamic, distance: of the margins. See `DynamicMarginMiner`.
        batches_per_epoch, seed, num_replicas, rank: of the sampler.
        **loss_kwargs: to `HierarchicalTripletLoss`, such as `temperature`, `reducer`, `swap`, `collect_stats`.

    Attributes:
        tree, sampler, miner, loss: the parts; they share the tree.
        batch_size: num_anchors * neighborhood_size * samples_per_class; of several processes, the part of one.

    Raises:
        ValueError: `tree` together with `num_levels` or `linkage`; an unknown form; a batch size that the counts do not
            make; batches of one class, or with one sample of each.
        ValueError, TypeError: as the parts do.

    Example:
        >>> import torch
        >>> from pml_htl import HTL
        >>> labels = torch.arange(20).repeat_interleave(8)
        >>> htl = HTL(labels, batch_size=32, seed=0)
        >>> len(next(iter(htl.sampler))), htl.sampler.num_anchors
        (32, 2)
    """

    def __init__(
        self,
        labels: Labels,
        batch_size: int | None = None,
        *,
        form: str = "recommended",
        num_anchors: int | None = None,
        neighborhood_size: int | None = None,
        samples_per_class: int | None = None,
        num_levels: int | None = None,
        linkage: str | None = None,
        tree: ClassTree | None = None,
        beta: float = 0.1,
        initial_margin: float = 0.2,
        dynamic: bool = True,
        distance: LpDistance | None = None,
        batches_per_epoch: int | None = None,
        seed: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        **loss_kwargs: Any,
    ) -> None:
        if tree is not None and (num_levels is not None or linkage is not None):
            raise ValueError(
                "a tree of one's own has its num_levels and linkage: leave both out, or leave out the tree; got "
                f"num_levels={num_levels!r} and linkage={linkage!r}"
            )
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, but it is {form!r}")
        num_anchors, neighborhood_size, samples_per_class = _counts(
            batch_size, num_anchors, neighborhood_size, samples_per_class
        )
        levels = 16 if num_levels is None else num_levels
        self.tree = ClassTree(levels, linkage="single" if linkage is None else linkage) if tree is None else tree
        self.sampler = AnchorNeighborSampler(
            labels,
            self.tree,
            num_anchors=num_anchors,
            neighborhood_size=neighborhood_size,
            samples_per_class=samples_per_class,
            batches_per_epoch=batches_per_epoch,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )
        if samples_per_class == 1 or num_anchors * neighborhood_size == 1:
            lacking = "positive" if samples_per_class == 1 else "negative"
            raise ValueError(
                f"num_anchors={num_anchors}, neighborhood_size={neighborhood_size}, samples_per_class={samples_per_class}: "
                f"no sample of a batch has a {lacking}, so that the loss is zero for ever; take two classes or more, two "
                f"samples or more of each. If a CrossBatchMemory brings the {lacking}s, make the parts one by one: an "
                "AnchorNeighborSampler takes such numbers"
            )
        if tree is None:  # any neighbour may be taken by the other classes of a batch, so as many are kept as a batch has
            self.tree.max_neighbors = max(self.tree.max_neighbors, num_anchors * neighborhood_size - 1)
        self.miner = DynamicMarginMiner(
            self.tree,
            beta=beta,
            initial_margin=initial_margin,
            dynamic=dynamic,
            distance=LpDistance(power=FORMS[form].power) if distance is None else distance,
        )
        smoothed = {} if loss_kwargs.get("smooth_loss") else {"temperature": FORMS[form].temperature}
        self.loss = HierarchicalTripletLoss(self.miner, **{**smoothed, **loss_kwargs})

    @property
    def batch_size(self) -> int:
        """That of the sampler."""
        return self.sampler.batch_size

    def refresh_hook(
        self, dataset: Dataset[Any] | None, then: Callable[[Any], Any] | None = None, **kwargs: Any
    ) -> TreeRefresh:
        """The hook that keeps the tree current; `kwargs` go to `TreeRefresh`, which gets the labels and the loss of this.

        With `mode="streaming"` the data set is not needed, and may be None.
        """
        return TreeRefresh(self.tree, dataset, then=then, **{"labels": self.sampler.labels, "loss": self.loss, **kwargs})


def _counts(
    batch_size: int | None, num_anchors: int | None, neighborhood_size: int | None, samples_per_class: int | None
) -> tuple[int, int, int]:
    """The three counts of a batch, those that are None chosen so that they make `batch_size`."""
    named = {"num_anchors": num_anchors, "neighborhood_size": neighborhood_size, "samples_per_class": samples_per_class}
    given = {name: integer_at_least(1, name, count) for name, count in named.items() if count is not None}
    if batch_size is None and "num_anchors" not in given:
        batch_size = BATCH_SIZE
    usual = {"neighborhood_size": NEIGHBORHOOD_SIZE, "samples_per_class": SAMPLES_PER_CLASS}
    # The first that is free follows from the batch size, the others are as usual.
    open_name = None if batch_size is None else next((name for name in named if name not in given), None)
    counts = {**{name: count for name, count in usual.items() if name != open_name}, **given}
    if batch_size is not None:
        batch_size, product = integer_at_least(1, "batch_size", batch_size), math.prod(counts.values())
        if open_name is not None:
            counts[open_name] = batch_size // product
        if math.prod(counts.values()) != batch_size:
            of_those = " * ".join(f"{name}={count}" for name, count in counts.items() if name != open_name)
            advice = f"a multiple of {product}" if open_name else f"{product}, or leave it out"
            raise ValueError(f"batch_size={batch_size} does not fit {of_those}; make it {advice}, or give other counts")
    return counts["num_anchors"], counts["neighborhood_size"], counts["samples_per_class"]
