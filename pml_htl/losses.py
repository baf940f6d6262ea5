"""Hierarchical Triplet Loss (method, section 4)."""

from __future__ import annotations

from typing import Any

import torch

from ._pml import AvgNonZeroReducer, BaseMetricLossFunction, convert_to_triplets
from .hinge import Triplets, all_triplets
from .miners import DynamicMarginMiner, check_distance


class HierarchicalTripletLoss(BaseMetricLossFunction):
    """Triplet loss with the dynamic margin of a class tree.

    The loss of a triplet is `max(0, d(a,p) - d(a,n) + alpha(y_a, y_n))`, with the miner's margins. It takes the place of
    PML's `TripletMarginLoss`, and while the tree is not fitted (or with any constant margin) it is exactly that loss with
    the same distance. Source: HTL (Ge et al., ECCV 2018), section 3.3; everything else as `TripletMarginLoss`.

    Requirements: labels, in every call, since margins belong to class pairs; batches with several samples per class.
    Recommendations: batches of an `AnchorNeighborSampler` with the same tree, and a `TreeRefresh` every epoch.
    Relations: `HTL` makes the loss and its companions in one call. Margins are squared distances by default, so a margin
    of 0.05 of `TripletMarginLoss` (plain distances) is not the same number here.

    Args:
        miner: the `DynamicMarginMiner` that knows the margins. It is asked for margins only; mined tuples come in through
            `indices_tuple`, as everywhere in PML.
        swap: use the positive-negative distance where it is the smaller one. Not with `ref_emb`.
        smooth_loss: softplus instead of max(0, .).
        triplets_per_anchor: "all", or how many random triplets for each anchor.
        **kwargs: PML's `distance` (default: the miner's, and no other), `reducer` (default `AvgNonZeroReducer`; the
            paper's average over all triplets is `MeanReducer`), `embedding_regularizer`, `embedding_reg_weight`,
            `collect_stats`.

    Recorded, beside what PML's classes record: `margin`, the mean over the triplets of the last batch.

    Call it with PML's `(embeddings, labels, indices_tuple, ref_emb, ref_labels)`. A batch without any triplet gives a zero
    loss that still backpropagates.

    Raises:
        ValueError: a distance that is not the miner's; when called, missing labels, `swap` with `ref_emb`, or a label that
            the fitted tree does not know.
        TypeError: `miner` is no DynamicMarginMiner.

    Example:
        >>> import torch
        >>> from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
        >>> labels = torch.arange(6).repeat_interleave(4)
        >>> embeddings = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
        >>> tree = ClassTree().fit_embeddings(embeddings, labels)
        >>> loss = HierarchicalTripletLoss(DynamicMarginMiner(tree))
        >>> bool(loss(embeddings, labels) > 0)
        True
    """

    def __init__(
        self,
        miner: DynamicMarginMiner,
        *,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: int | str = "all",
        **kwargs: Any,
    ) -> None:
        if not isinstance(miner, DynamicMarginMiner):
            raise TypeError(f"miner must be a DynamicMarginMiner, but it is a {type(miner).__name__}")
        distance = kwargs.pop("distance", None)
        super().__init__(distance=miner.distance if distance is None else distance, **kwargs)
        check_distance(self.distance)
        if self.distance.power != miner.distance.power:
            raise ValueError(
                f"the loss was given a distance of power {self.distance.power}, but the miner's margins are for power "
                f"{miner.distance.power}; give the distance to the miner, the loss takes it from there"
            )
        self.miner = miner
        self.swap = swap
        self.smooth_loss = smooth_loss
        self.triplets_per_anchor = triplets_per_anchor
        self.margin: float | torch.Tensor = miner.initial_margin
        self.add_to_recordable_attributes(name="margin", is_stat=False)

    def compute_loss(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None,
        indices_tuple: tuple[torch.Tensor, ...] | None,
        ref_emb: torch.Tensor,
        ref_labels: torch.Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """PML's loss dictionary: one loss per triplet and the triplets' indices."""
        if labels is None or ref_labels is None:
            missing = "labels" if labels is None else "ref_labels"
            raise ValueError(f"{missing} are required, also with indices_tuple: the margins belong to class pairs")
        if self.swap and ref_emb is not embeddings:
            raise ValueError(
                "swap=True does not work with ref_emb: it compares positives with negatives, and both are in ref_emb; "
                "use swap=False"
            )
        anchors, positives, negatives = self._triplets(labels, indices_tuple, ref_labels)
        if len(anchors) == 0:
            return self.zero_losses()
        distances = self.distance(embeddings, ref_emb)
        to_positive, to_negative = distances[anchors, positives], distances[anchors, negatives]
        if self.swap:
            to_negative = self.distance.smallest_dist(to_negative, distances[positives, negatives])
        margins = self.miner.margins(labels.unsqueeze(1), ref_labels.unsqueeze(0)).to(distances.dtype)  # (B, R)
        margins = margins[anchors, negatives]
        if self.miner.tree.is_fitted:
            self.margin = margins.mean()  # stays on its device: whoever records it waits for it
        violation = self.distance.margin(to_positive, to_negative) + margins
        losses = torch.nn.functional.softplus(violation) if self.smooth_loss else torch.nn.functional.relu(violation)
        return {
            "loss": {"losses": losses, "indices": (anchors, positives, negatives), "reduction_type": "triplet"},
        }

    def get_default_reducer(self) -> AvgNonZeroReducer:
        """That of PML's `TripletMarginLoss`."""
        return AvgNonZeroReducer()

    def _triplets(
        self, labels: torch.Tensor, indices_tuple: tuple[torch.Tensor, ...] | None, ref_labels: torch.Tensor
    ) -> Triplets:
        if indices_tuple is None and self.triplets_per_anchor == "all":
            return all_triplets(labels, ref_labels)  # without PML's B x B x B mask
        return convert_to_triplets(indices_tuple, labels, ref_labels, t_per_anchor=self.triplets_per_anchor)
