"""Hierarchical Triplet Loss (method, section 4), and those of PML's wrappers that name the losses they take."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import _pml
from ._pml import AvgNonZeroReducer, BaseMetricLossFunction, SumReducer, get_random_triplet_indices
from .arithmetic.classes import classes_of, pairs_of_classes
from .arithmetic.distances import distance_matrix
from .arithmetic.reductions import HingeLosses, Reduction, can_reduce, fill_stats, reduce_losses, reducer_of_triplets
from .arithmetic.softmax import soft_losses_of_pairs, soft_losses_of_triplets
from .arithmetic.triplets import Mined, Triplets, all_triplets, pairs_of_labels, pairs_of_tuple, triplets_of_tuple
from .common.labels import Labels, integer_at_least
from .common.precision import full_precision
from .common.transforms import is_batched, lasting
from .common.warn import IdleWatch
from .inputs import prepare_indices, prepare_inputs
from .miners import MINED_BY, DynamicMarginMiner, check_distance


class _Batch(NamedTuple):
    """What PML hands to a loss, once it is checked: (B, D), (B,), the indices of mined tuples or None, (R, D), (R,)."""

    embeddings: torch.Tensor
    labels: torch.Tensor
    mined: Mined | None
    ref_emb: torch.Tensor
    ref_labels: torch.Tensor


class HierarchicalTripletLoss(BaseMetricLossFunction):
    """Triplet loss with the dynamic margin of a class tree.

    The loss of a triplet is `max(0, d(a,p) - d(a,n) + alpha(y_a, y_n))`, with the miner's margins. It takes the place of
    PML's `TripletMarginLoss`, and while the tree is not fitted (or with any constant margin) it is that loss with the same
    distance. Source: HTL (Ge et al., ECCV 2018), section 3.3; everything else as `TripletMarginLoss`.

    Requirements: labels, in every call, since margins belong to class pairs; batches with several samples per class.
    Recommendations: batches of an `AnchorNeighborSampler` with the same tree, and a `TreeRefresh` every epoch.
    Relations: `HTL` makes the loss and its companions in one call. Margins are squared distances by default, so a margin
    of 0.05 of `TripletMarginLoss` (plain distances) is not the same number here.

    Args:
        miner: the `DynamicMarginMiner` that knows the margins. It is asked for margins only; mined tuples come in through
            `indices_tuple`, as everywhere in PML.
        swap: use the positive-negative distance where it is the smaller one. Not with `ref_emb`.
        smooth_loss: softplus instead of max(0, .).
        temperature: a smooth maximum over the negatives instead of max(0, .) of each triplet: every anchor and positive have
            one loss, `temperature * log(1 + sum over n of exp(v / temperature))` of the violations
            `v = d(a,p) - d(a,n) + alpha`, in the units of the distance; 0.03 to 0.1 are usual. Near negatives then count
            most. With squared distances and no margin it is `temperature` times PML's
            `NTXentLoss(temperature / 2)`. The reducer gets losses of pairs, so `PerAnchorReducer` works too.
        triplets_per_anchor: "all", or how many random triplets for each anchor.
        **kwargs: PML's `distance` (default: the miner's, and no other), `reducer` (default `AvgNonZeroReducer`; the
            paper's average over all triplets is `MeanReducer`), `embedding_regularizer`, `embedding_reg_weight`,
            `collect_stats`.

    Call it with PML's `(embeddings, labels, indices_tuple, ref_emb, ref_labels)`. A batch without any triplet gives a zero
    loss that still backpropagates. Embeddings in half precision are raised to float32, with autocast off; so is the loss.

    All triplets, and those of a pair tuple, are not listed where PML's own mean, sum, non-zero average, threshold or
    class-weighted reducer follows: memory is then O(B R) for R reference samples. Swap, smooth_loss, other reducers, mined
    triplets and random ones take the list of triplets, as in PML, but never more than that. With
    `torch.use_deterministic_algorithms(True)` nothing is called that torch lists as raising on CUDA; the sums take some more
    passes over B x R.

    `torch.func` may transform it (grad, vmap, jvp, jacrev, hessian, ...), for more time and memory. `vmap` goes over
    embeddings, and where sums are enough over labels too; reducers with a threshold it cannot follow through a list of
    losses. What it makes several of (such as the share of active triplets) is not recorded then.

    In eval mode (`loss.eval()`) it takes labels that the tree does not know, for a validation loss on unseen classes. A pair
    of which one class or both are unknown has the margin `initial_margin`, before the first fit and after it; a pair of
    known classes has its own. On unseen classes it is thus `TripletMarginLoss(initial_margin, distance=...)` all along: no
    refresh of the tree moves it, so that epochs, runs and losses can be compared. Calls in eval mode count for no warning
    and no streaming refresh. In training mode such a label is an error. A `CrossBatchMemory` keeps what it is called with,
    in eval mode too: for validation call the loss in it, `memory.loss`.

    Recorded, beside what PML's classes record: `margin`, the mean over the triplets of the last batch; with `collect_stats`
    also `min_margin`, `max_margin`, and `active_share`, the share of triplets with a loss above zero. The tree records
    itself. A warning comes once if no triplet has counted for 100 batches, and once if a miner of `type_of_triplets`
    "all" has chosen the triplets that make up this loss anyway.

    Raises:
        ValueError: a distance that is not the miner's; when called, missing labels, wrong shapes or lengths, indices outside
            of the batch, `swap` with `ref_emb`, or, in training mode, a label that the fitted tree does not know (a
            device-side assertion for labels on a GPU; labels on the host are named).
        TypeError: `miner` is no DynamicMarginMiner; when called, embeddings that are not floats, or labels or indices that
            are not integers.

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
        temperature: float | None = None,
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
        if temperature is not None:
            is_number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
            if not is_number or not 0 < temperature < math.inf:
                raise ValueError(f"temperature must be a number above 0, or None for max(0, .), but it is {temperature!r}")
            if smooth_loss:
                raise ValueError("temperature and smooth_loss=True are two ways to smooth one maximum; give one of them")
        if not callable(self.reducer):
            raise TypeError(f"reducer must be one of PML's reducers, but it is {self.reducer!r}")
        if triplets_per_anchor != "all":
            integer_at_least(1, 'triplets_per_anchor, if not "all",', triplets_per_anchor)
        self.miner = miner
        self.swap = swap
        self.smooth_loss = smooth_loss
        self.temperature = temperature
        self.triplets_per_anchor = triplets_per_anchor
        self.margin: float | torch.Tensor = miner.initial_margin
        self.add_to_recordable_attributes(name="margin", is_stat=False)
        self.add_to_recordable_attributes(list_of_names=["min_margin", "max_margin", "active_share"], is_stat=True)
        self._watch = IdleWatch()
        self._has_warned_of_miner = False
        self._known_nodes: torch.Tensor | None = None  # of the tree, in the last batch
        self._reduced: tuple[HingeLosses, Reduction] | None = None  # only during a call

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: Labels | None = None,
        indices_tuple: tuple[torch.Tensor, ...] | None = None,
        ref_emb: torch.Tensor | None = None,
        ref_labels: Labels | None = None,
    ) -> torch.Tensor:
        """The reduced loss; arguments as in PML: (B, D), (B,), a tuple of 3 or 4 index tensors, (R, D), (R,)."""
        known_to = self.miner.tree if self.training else None
        inputs = prepare_inputs(known_to, embeddings, labels, ref_emb, ref_labels)
        embeddings, labels, ref_emb, ref_labels = inputs
        try:
            with full_precision(embeddings.device):
                loss = super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            if self._reduced is not None:
                fill_stats(reducer_of_triplets(self.reducer), *self._reduced)
        finally:
            self._reduced = None
        return loss

    if TYPE_CHECKING:
        __call__ = forward  # torch's own gives Any

    def compute_loss(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        indices_tuple: tuple[torch.Tensor, ...] | None,
        ref_emb: torch.Tensor,
        ref_labels: torch.Tensor,
    ) -> dict[str, dict[str, Any]]:
        """PML's loss dictionary: the reduced loss where sums are enough for the reducer, else one loss per triplet."""
        if self.swap and ref_emb is not embeddings:
            raise ValueError(
                "swap=True does not work with ref_emb: it compares positives with negatives, and both are in ref_emb; "
                "use swap=False"
            )
        mined = None
        if indices_tuple is not None:
            mined = prepare_indices(indices_tuple, len(labels), len(ref_labels), embeddings.device)
            self._warn_of_redundant_miner(indices_tuple)
        batch = _Batch(embeddings, labels, mined, ref_emb, ref_labels)
        if self.temperature is not None and self._has_all_negatives(mined) and not self.swap:
            return self._softened(self.temperature, batch)
        return self._listed(batch) if self._needs_list(mined) else self._summed(batch)

    def get_default_reducer(self) -> AvgNonZeroReducer:
        """That of PML's `TripletMarginLoss`."""
        return AvgNonZeroReducer()

    def _has_all_negatives(self, mined: Mined | None) -> bool:
        """Whether every positive of an anchor stands with every negative of it."""
        return self.triplets_per_anchor == "all" if mined is None else len(mined) == 4

    def _needs_list(self, mined: Mined | None) -> bool:
        by_sums = can_reduce(reducer_of_triplets(self.reducer)) and self.temperature is None
        return self.swap or self.smooth_loss or not (by_sums and self._has_all_negatives(mined))

    def _summed(self, batch: _Batch) -> dict[str, dict[str, Any]]:
        losses = self._hinge_losses(batch)
        reduction = reduce_losses(reducer_of_triplets(self.reducer), losses)
        if not is_batched(reduction.num_counted):
            self._reduced = losses, reduction
        self._record(losses.mean_margin(), losses.margin_range, losses.active_triplets, reduction.num_active)
        return {"loss": {"losses": reduction.value, "indices": None, "reduction_type": "already_reduced"}}

    def _softened(self, temperature: float, batch: _Batch) -> dict[str, dict[str, Any]]:
        hinge = self._hinge_losses(batch)
        losses, pairs = soft_losses_of_pairs(hinge.distances, hinge.margins, hinge.pairs, temperature)
        num_losses = torch.full((), len(losses), device=batch.embeddings.device)  # none of them is zero
        self._record(hinge.mean_margin(), hinge.margin_range, hinge.active_triplets, num_losses)
        if len(losses) == 0:
            return self.zero_losses()
        return {"loss": {"losses": losses, "indices": pairs, "reduction_type": "pos_pair"}}

    def _hinge_losses(self, batch: _Batch) -> HingeLosses:
        embeddings, labels, mined, ref_emb, ref_labels = batch
        distances = distance_matrix(self.distance, embeddings, ref_emb)
        if mined is None and ref_labels is labels and labels.device.type == "cpu" and not is_batched(labels):
            classes = classes_of(labels)
            margins = self.miner.margins_between(classes.labels, classes.labels, distances.dtype, training=self.training)
            return HingeLosses(distances, margins, pairs_of_classes(classes), labels)
        if mined is None:
            pairs = pairs_of_labels(labels, ref_labels)
        else:
            assert len(mined) == 4  # triplets are listed
            pairs = pairs_of_tuple(mined, len(labels), len(ref_labels))
        margins = self.miner.margin_matrix(labels, ref_labels, distances.dtype, training=self.training)
        return HingeLosses(distances, margins, pairs, labels)

    def _listed(self, batch: _Batch) -> dict[str, dict[str, Any]]:
        embeddings, labels, mined, ref_emb, ref_labels = batch
        anchors, positives, negatives = self._triplets(labels, mined, ref_labels)
        if len(anchors) == 0:
            if self.training:
                for known in (labels, ref_labels):  # labels of another data set have no triplets either
                    self.miner.tree.check_labels(known)
            self._note_active(torch.zeros((), dtype=torch.int64, device=embeddings.device))
            return self.zero_losses()
        distances = distance_matrix(self.distance, embeddings, ref_emb)
        to_positive, to_negative = distances[anchors, positives], distances[anchors, negatives]
        if self.swap:
            to_negative = self.distance.smallest_dist(to_negative, distances[positives, negatives])
        margins = self.miner.margin_matrix(labels, ref_labels, distances.dtype, training=self.training)
        margins = margins[anchors, negatives]
        violation = self.distance.margin(to_positive, to_negative) + margins
        active = violation.detach() > 0
        num_active = active.sum()
        self._record(margins.mean(), lambda: torch.aminmax(margins), lambda: (num_active, len(active)), num_active)
        if self.temperature is not None:
            triplets = anchors, positives, negatives
            losses, pairs = soft_losses_of_triplets(violation, triplets, len(ref_labels), self.temperature)
            return {"loss": {"losses": losses, "indices": pairs, "reduction_type": "pos_pair"}}
        losses = torch.nn.functional.softplus(violation) if self.smooth_loss else torch.nn.functional.relu(violation)
        return {
            "loss": {"losses": losses, "indices": (anchors, positives, negatives), "reduction_type": "triplet"},
        }

    def _triplets(self, labels: torch.Tensor, mined: Mined | None, ref_labels: torch.Tensor) -> Triplets:
        if mined is None and self.triplets_per_anchor == "all":
            return all_triplets(labels, ref_labels)
        if mined is None:
            return get_random_triplet_indices(labels, ref_labels, t_per_anchor=self.triplets_per_anchor)
        return triplets_of_tuple(mined) if len(mined) == 4 else mined

    def _record(
        self,
        mean_margin: torch.Tensor,
        margin_range: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        active_triplets: Callable[[], tuple[torch.Tensor, torch.Tensor | int]],  # how many are active, of how many
        num_active: torch.Tensor,
    ) -> None:
        nodes = self.miner.tree.nodes
        # Under vmap there is a value for each copy, and none to record.
        if nodes is not None and not is_batched(mean_margin):
            # The mean stays on its device: whoever records it waits for it. NaN is of no triplets.
            self.margin = lasting(torch.where(mean_margin.isnan(), self.margin, mean_margin))
        if self.collect_stats:
            low, high = margin_range()
            num_active_triplets, num_triplets = active_triplets()
            if not any(map(is_batched, (low, high, num_active_triplets))):
                self.min_margin, self.max_margin = float(low), float(high)
                self.active_share = int(num_active_triplets) / max(1, int(num_triplets))
        self._note_active(num_active)

    def _note_active(self, num_active: torch.Tensor) -> None:
        if not self.training:  # nothing is learned from validation batches
            return
        # A refresh has made everyone wait anyway, so after it the watch may look at the device.
        nodes = self.miner.tree.nodes
        self._watch.note(num_active, look=nodes is not self._known_nodes)
        self._known_nodes = nodes

    def _warn_of_redundant_miner(self, indices_tuple: tuple[torch.Tensor, ...]) -> None:
        miner = getattr(indices_tuple[0], MINED_BY, None)
        if self._has_warned_of_miner or miner is None or miner.type_of_triplets != "all":
            return
        if self.swap or self.smooth_loss or self.temperature is not None or self.triplets_per_anchor != "all":
            return
        sums_active_ones = type(reducer_of_triplets(self.reducer)) in (AvgNonZeroReducer, SumReducer)
        if sums_active_ones and miner.has_margins_of(self.miner):
            self._has_warned_of_miner = True
            warnings.warn(
                'the tuple miner with type_of_triplets="all" costs time for nothing: this loss counts the triplets that '
                'violate their margins anyway, and only those; leave the miner out, or mine "semihard" or "hard" ones',
                stacklevel=2,
            )


class CrossBatchMemory(_pml.CrossBatchMemory):
    """PML's `CrossBatchMemory` that takes a `HierarchicalTripletLoss` as well, and whose place in its queue is saved.

    Source: Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020. PML's own class names the losses that it
    takes, and forgets in its `state_dict` how far the memory is filled. The loss joins the memory's pairs in O(B R) for a
    memory of R, see `HierarchicalTripletLoss`.
    """

    @staticmethod
    def supported_losses() -> list[str]:
        """The names of the losses that it takes."""
        return [*_pml.CrossBatchMemory.supported_losses(), HierarchicalTripletLoss.__name__]

    def get_extra_state(self) -> torch.Tensor:
        """For `state_dict`: where the next batch goes, and whether the memory has been full."""
        return torch.tensor([self.queue_idx, int(self.has_been_filled)])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """For `load_state_dict`."""
        self.queue_idx, self.has_been_filled = int(state[0]), bool(state[1])


class SelfSupervisedLoss(_pml.SelfSupervisedLoss):
    """PML's `SelfSupervisedLoss`, which refuses a `HierarchicalTripletLoss`, and here says why.

    Raises:
        ValueError: given a `HierarchicalTripletLoss`.
    """

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Raises unless the loss of this name is supported."""
        if loss_name == HierarchicalTripletLoss.__name__:
            raise ValueError(
                "SelfSupervisedLoss makes up the labels 0 .. B-1, and the class tree would take them for classes of the "
                "data set; HierarchicalTripletLoss needs real labels, so call it with (embeddings, labels) instead"
            )
        super().check_loss_support(loss_name)
