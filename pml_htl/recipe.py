"""All parts of Hierarchical Triplet Loss, made and wired in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from ._pml import LpDistance
from .common.labels import Labels
from .hooks import TreeRefresh
from .losses import HierarchicalTripletLoss
from .miners import DynamicMarginMiner
from .samplers import AnchorNeighborSampler
from .tree import ClassTree


class HTL:
    """A class tree with its sampler, miner and loss.

    Args:
        labels: (N,) the label of every training sample, as sampler and loss see them (after any mapping).
        num_anchors, neighborhood_size, samples_per_class: the batch: so many anchor classes, each with its neighbourhood of
            so many classes (itself counted), so many samples of each. At least two classes, and two samples of each, so
            that there are triplets. See `AnchorNeighborSampler`.
        num_levels, linkage: of the tree, 16 and "single" by default. See `ClassTree`.
        tree: instead, a tree of one's own with its own settings, such as `ClassTree.from_taxonomy(...)`. Its `max_neighbors`
            should be at least `num_anchors * neighborhood_size - 1`: any neighbour may be taken by the other classes of a
            batch.
        beta, initial_margin, tree_weight, continuous, distance: of the margins. See `DynamicMarginMiner`.
        batches_per_epoch, seed, num_replicas, rank: of the sampler.
        **loss_kwargs: to `HierarchicalTripletLoss`, such as `temperature`, `reducer`, `swap`, `collect_stats`.

    Attributes:
        tree, sampler, miner, loss: the parts; they share the tree.
        batch_size: num_anchors * neighborhood_size * samples_per_class; of several processes, the part of one.

    Raises:
        ValueError: `tree` together with `num_levels` or `linkage`, or batches of one class, or with one sample of each.
        ValueError, TypeError: as the parts do.

    Example:
        >>> import torch
        >>> from pml_htl import HTL
        >>> labels = torch.arange(20).repeat_interleave(8)
        >>> htl = HTL(labels, num_anchors=2, neighborhood_size=3, samples_per_class=4, seed=0)
        >>> len(next(iter(htl.sampler))), htl.batch_size
        (24, 24)
    """

    def __init__(
        self,
        labels: Labels,
        *,
        num_anchors: int,
        neighborhood_size: int,
        samples_per_class: int,
        num_levels: int | None = None,
        linkage: str | None = None,
        tree: ClassTree | None = None,
        beta: float = 0.1,
        initial_margin: float = 0.2,
        tree_weight: float = 1.0,
        continuous: bool = False,
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
            tree_weight=tree_weight,
            continuous=continuous,
            distance=distance,
        )
        self.loss = HierarchicalTripletLoss(self.miner, **loss_kwargs)

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
