"""The dynamic violate margin of class pairs, and a miner for the triplets that violate it (method, section 4)."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

import torch

from ._pml import BaseMiner, LpDistance
from .arithmetic.hinge import margin_for_class_pairs
from .arithmetic.triplets import Triplets, pairs_of_labels, triplets_where
from .common.batches import joint_shape
from .common.labels import Labels, label_tensor
from .common.precision import full_precision, widest_float
from .common.transforms import is_batched
from .inputs import prepare_inputs
from .tree import ClassTree

MINED_BY = "mined_by"  # what the tensor of anchors is marked with, for the loss to see
TYPES_OF_TRIPLETS = ("all", "hard", "semihard", "easy")


class DynamicMarginMiner(BaseMiner):
    """Holds the margin of every class pair, `alpha = beta + d_H(y_a, y_n) - s_{y_a}`, and mines by it.

    `d_H` is the threshold at which the classes of anchor and negative meet in the tree, `s` the spread of the anchor's
    class: near classes get small margins, far ones large. `HierarchicalTripletLoss` asks it for margins only. Give it to
    a trainer as tuple miner (with "hard" or "semihard") to train on a part of the triplets; as "all" it changes nothing
    for that loss with its default reducer, swap and smooth_loss. Source: HTL (Ge et al., ECCV 2018), section 3.3; mining
    as PML's `TripletMarginMiner`.

    Args:
        tree: the tree that it shares with the sampler.
        beta: constant part of the margin, 0.1 in the paper.
        initial_margin: the margin of every pair while the tree is not fitted, in the units of `distance`; afterwards of
            pairs with a class that has had no samples yet (`ClassTree.waiting`), and in eval mode of pairs with any class
            that the tree does not know.
        dynamic: False gives every pair the constant margin `beta`, whether the tree is fitted or not.
        type_of_triplets: "all" that violate their margin; of these "hard", with the negative no farther than the
            positive, or "semihard", with the negative farther; or "easy", all that do not violate it.
        distance: `LpDistance(p=2, power=2)` (default; margins in squared distances, the units of the tree) or
            `LpDistance(p=2, power=1)` (margins in plain ones, `beta + sqrt(d_H) - sqrt(s)`), on normalised embeddings.
        collect_stats: as in PML; records what `TripletMarginMiner` does, over all triplets of the batch.

    In training mode every label must be one of the tree's `all_labels`. In eval mode (`miner.eval()`, or that of the loss
    which holds it) other labels may come, such as those of validation classes: see `HierarchicalTripletLoss`.

    Raises:
        ValueError: an unknown `type_of_triplets`, or a distance that the margins are not defined for; when used in training
            mode, a label that the tree does not know.
        TypeError: `tree` is no ClassTree.
    """

    def __init__(
        self,
        tree: ClassTree,
        *,
        beta: float = 0.1,
        initial_margin: float = 0.2,
        dynamic: bool = True,
        type_of_triplets: str = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(tree, ClassTree):
            raise TypeError(f"tree must be a ClassTree, but it is a {type(tree).__name__}")
        if type_of_triplets not in TYPES_OF_TRIPLETS:
            raise ValueError(
                f"type_of_triplets must be one of {', '.join(TYPES_OF_TRIPLETS)}, but it is {type_of_triplets!r}"
            )
        check_distance(self.distance)
        self.tree = tree
        self.beta = _finite("beta", beta)
        self.initial_margin = _finite("initial_margin", initial_margin)
        self.dynamic = bool(dynamic)
        self.type_of_triplets = type_of_triplets
        self.add_to_recordable_attributes(list_of_names=["beta", "initial_margin"], is_stat=False)
        self.add_to_recordable_attributes(
            list_of_names=["avg_triplet_margin", "pos_pair_dist", "neg_pair_dist"], is_stat=True
        )

    def get_default_distance(self) -> LpDistance:
        """Squared Euclidean distance of normalised embeddings."""
        return LpDistance(normalize_embeddings=True, p=2, power=2)

    @property
    def constant_margin(self) -> float | None:
        """The margin of every pair: `beta` unless it is dynamic, `initial_margin` before the tree's fit; None afterwards."""
        if not self.dynamic:
            return self.beta
        return None if self.tree.is_fitted else self.initial_margin

    @torch.no_grad()
    def margins(self, anchor_labels: Labels, negative_labels: Labels) -> torch.Tensor:
        """alpha of class pairs in the units of `distance`.

        It is `constant_margin` where that is a number; else `initial_margin` for pairs of which one class or both have had
        no samples yet or, in eval mode, are not known to the tree.

        Args:
            anchor_labels, negative_labels: labels of any shapes that broadcast, such as (B, 1) and (1, R).

        Returns:
            float64 of the broadcast shape; float32 for labels on a device that has no float64. A class and itself has a
            margin too: that of a negative in the same node.
        """
        anchors, negatives = label_tensor(anchor_labels), label_tensor(negative_labels)
        shape = joint_shape(anchors, negatives)
        if self.constant_margin is not None:
            return torch.full(shape, self.constant_margin, dtype=widest_float(anchors.device), device=anchors.device)
        known = None
        if self._takes_unknown(self.training, anchors, negatives):
            (anchors, known_anchors), (negatives, known_negatives) = map(self.tree.replace_unknown, (anchors, negatives))
            known = known_anchors & known_negatives
        margins = self._margins_of(self.tree.merge_thresholds(anchors, negatives), self.tree.class_spreads(anchors))
        return margins if known is None else margins.where(known, self.initial_margin)

    @torch.no_grad()
    def margin_matrix(
        self, labels: torch.Tensor, ref_labels: torch.Tensor, dtype: torch.dtype, *, training: bool = True
    ) -> torch.Tensor:
        """`margins` of labels (B,) and ref_labels (R,) in training or eval mode: (B, R) of `dtype`."""
        # The number of distinct labels is not known there without waiting, or is another one for each copy under vmap.
        waits = labels.device.type != "cpu" or is_batched(labels) or is_batched(ref_labels)
        if waits or self.constant_margin is not None:
            return self.margins_between(labels, ref_labels, dtype, training=training)
        classes, rows = labels.unique(return_inverse=True)
        ref_classes, columns = (classes, rows) if ref_labels is labels else ref_labels.unique(return_inverse=True)
        margins = self.margins_between(classes, ref_classes, dtype, training=training)
        return margins.index_select(1, columns).index_select(0, rows)

    @torch.no_grad()
    def margins_between(
        self, labels: torch.Tensor, ref_labels: torch.Tensor, dtype: torch.dtype, *, training: bool = True
    ) -> torch.Tensor:
        """The same, quicker where no label is there twice."""
        if self.constant_margin is not None:
            return torch.full((len(labels), len(ref_labels)), self.constant_margin, dtype=dtype, device=labels.device)
        return self._margins_of_all(labels, ref_labels, training).to(dtype)

    def has_margins_of(self, other: DynamicMarginMiner) -> bool:
        """Whether both give every pair of classes the same margin."""
        mine, others = ((m.beta, m.initial_margin, m.dynamic, m.distance.power) for m in (self, other))
        return self.tree is other.tree and mine == others

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: Labels,
        ref_emb: torch.Tensor | None = None,
        ref_labels: Labels | None = None,
    ) -> Triplets:
        """The mined triplets; arguments as in PML: (B, D), (B,), (R, D), (R,)."""
        known_to = self.tree if self.training else None
        inputs = prepare_inputs(known_to, embeddings, labels, ref_emb, ref_labels)
        with full_precision(embeddings.device):
            found = super().forward(*inputs)
        setattr(found[0], MINED_BY, self)
        return found

    if TYPE_CHECKING:
        __call__ = forward  # torch's own gives Any

    def mine(
        self, embeddings: torch.Tensor, labels: torch.Tensor, ref_emb: torch.Tensor, ref_labels: torch.Tensor
    ) -> Triplets:
        """The triplets of `type_of_triplets`, int64 indices into `embeddings` and twice into `ref_emb`."""
        pairs = pairs_of_labels(labels, ref_labels)
        matches, differs = pairs.positives, pairs.negatives
        distances = self.distance(embeddings, ref_emb)  # PML's own, so that ties fall as they do there
        margins = self.margin_matrix(labels, ref_labels, distances.dtype, training=self.training)
        self._set_stats(distances, matches, differs)
        to_negatives = distances.where(differs, torch.nan)  # which is neither within the margin nor beyond it

        def negatives(anchors: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
            gap = to_negatives[anchors].sub_(distances[anchors, positives].unsqueeze(1))  # (P, R)
            if self.type_of_triplets == "easy":
                return gap > margins[anchors]
            wanted = gap <= margins[anchors]
            if self.type_of_triplets == "hard":
                wanted &= gap <= 0
            elif self.type_of_triplets == "semihard":
                wanted &= gap > 0
            return wanted

        return triplets_where(matches, negatives)

    def _margins_of_all(self, labels: torch.Tensor, ref_labels: torch.Tensor, training: bool) -> torch.Tensor:
        """alpha of every label of (A,) with every one of (B,)."""
        if not self._takes_unknown(training, labels, ref_labels):
            return self._margins_of(*self.tree.margin_terms(labels, ref_labels))
        ours, known = self.tree.replace_unknown(labels)
        others, others_known = (ours, known) if ref_labels is labels else self.tree.replace_unknown(ref_labels)
        margins = self._margins_of(*self.tree.margin_terms(ours, others))
        return margins.where(known.unsqueeze(1) & others_known, self.initial_margin)

    def _takes_unknown(self, training: bool, *given: torch.Tensor) -> bool:
        """Whether the tree may be asked for classes it does not hold; if only for those that wait, no other is given."""
        if training and self.tree.waiting is not None:
            for labels in given:
                self.tree.check_labels(labels)
        return not training or self.tree.waiting is not None

    def _margins_of(self, merge_distances: torch.Tensor, spreads: torch.Tensor) -> torch.Tensor:
        return margin_for_class_pairs(merge_distances, spreads, self.beta, self.distance.power)

    def _set_stats(self, distances: torch.Tensor, matches: torch.Tensor, differs: torch.Tensor) -> None:
        """Means over all triplets, each pair weighted by the number of triplets it stands in."""
        if not self.collect_stats:
            return
        num_positives = matches.sum(dim=1, keepdim=True)
        num_negatives = differs.sum(dim=1, keepdim=True)
        num_triplets = (num_positives * num_negatives).sum()
        self.pos_pair_dist = ((distances * matches * num_negatives).sum() / num_triplets).item()
        self.neg_pair_dist = ((distances * differs * num_positives).sum() / num_triplets).item()
        self.avg_triplet_margin = self.neg_pair_dist - self.pos_pair_dist


def check_distance(distance: Any) -> None:
    """Raises a `ValueError` unless the margins are defined for this distance."""
    known = isinstance(distance, LpDistance) and distance.normalize_embeddings and distance.p == 2
    if not known or distance.power not in (1, 2):
        given = ", ".join(
            f"{name}={getattr(distance, name)}" for name in ("p", "power", "normalize_embeddings") if hasattr(distance, name)
        )
        raise ValueError(
            "the margins are squared or plain Euclidean distances of normalised embeddings: distance must be "
            f"LpDistance(p=2, power=2) or LpDistance(p=2, power=1), but it is {type(distance).__name__}({given})"
        )


def _finite(name: str, value: float) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, but it is {value!r}")
    return float(value)
