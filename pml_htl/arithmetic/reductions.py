"""What PML's reducers make of the losses of all triplets, from sums per anchor instead of a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .. import _pml
from ..common.transforms import lasting
from .classes import ClassPairs
from .hinge import hinge_sums
from .triplets import Pairs


@dataclass(frozen=True)
class HingeLosses:
    """The losses of all triplets of a batch, not listed: `max(0, d(a,p) - d(a,n) + alpha(a,n))`.

    distances: (B, R). margins: as the pairs take them. pairs: the triplets. labels: (B,) of the anchors.
    """

    distances: torch.Tensor
    margins: torch.Tensor
    pairs: Pairs | ClassPairs
    labels: torch.Tensor

    def sums(self, floor: float = 0.0, ceiling: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each anchor's losses above `floor` (at least 0) and below `ceiling`: their sum and their number, (B,)."""
        return hinge_sums(self.distances, self.margins, self.pairs, floor, ceiling)

    @torch.no_grad()
    def mean_margin(self) -> torch.Tensor:
        """The mean margin of all triplets, a scalar; NaN without any."""
        return self.pairs.mean_margin(self.margins)

    def margin_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest margin of a triplet, scalars; zeros without any."""
        return self.pairs.margin_range(self.margins)

    def active_triplets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How many triplets have a loss above zero, and how many there are, int64 scalars."""
        return self.count(), self.pairs.num_triplets()

    @torch.no_grad()
    def count(self, floor: float = 0.0) -> torch.Tensor:
        """How many are above `floor` (at least 0), an int64 scalar."""
        return self.sums(floor)[1].sum()


@dataclass(frozen=True)
class Reduction:
    """A reduced loss (a scalar that backpropagates), how many losses it was made of, and how many above zero (scalars)."""

    value: torch.Tensor
    num_counted: torch.Tensor
    num_active: torch.Tensor


def reducer_of_triplets(reducer: _pml.BaseReducer) -> _pml.BaseReducer:
    """The reducer that gets the triplets' losses: with a regularizer PML has one for each part of the loss."""
    if type(reducer) is _pml.MultipleReducers:
        return reducer.reducers["loss"] if "loss" in reducer.reducers else reducer.default_reducer
    return reducer


def can_reduce(reducer: _pml.BaseReducer) -> bool:
    """Whether sums are enough for it. Only for PML's own classes: a subclass may do anything with the losses."""
    return type(reducer) in _REDUCTIONS


def reduce_losses(reducer: _pml.BaseReducer, losses: HingeLosses) -> Reduction:
    """What `reducer`, one that `can_reduce`, would make of the list of all losses."""
    return _REDUCTIONS[type(reducer)](reducer, losses)


def fill_stats(reducer: _pml.BaseReducer, losses: HingeLosses, reduction: Reduction) -> None:
    """Records on the reducer what it records itself when it gets a list; to be called after the reducer."""
    if not reducer.collect_stats:
        return
    num_losses = int(losses.pairs.num_triplets())
    reducer.losses_size = num_losses or 1  # the zero that stands for no losses counts as one
    if isinstance(reducer, _pml.ThresholdReducer) and num_losses:
        reducer.num_past_filter = int(reduction.num_counted)
        if reducer.low is not None:
            reducer.num_above_low = num_losses if reducer.low < 0 else int(losses.count(reducer.low))
        if reducer.high is not None:
            reducer.num_above_high = reducer.num_past_filter  # PML's name for those below it


def _sum(reducer: _pml.BaseReducer, losses: HingeLosses) -> Reduction:
    sums, counts = losses.sums()
    return Reduction(sums.sum(), losses.pairs.num_triplets(), counts.sum())


def _mean(reducer: _pml.BaseReducer, losses: HingeLosses) -> Reduction:
    total = _sum(reducer, losses)
    return replace(total, value=total.value / total.num_counted.clamp(min=1))


def _class_weighted(reducer: _pml.ClassWeightedReducer, losses: HingeLosses) -> Reduction:
    sums, counts = losses.sums()
    class_weights = reducer.weights.to(sums)
    reducer.weights = lasting(class_weights)  # moved once, as PML does
    has_triplets = losses.pairs.num_positives * losses.pairs.num_negatives > 0
    weights = class_weights[losses.labels.where(has_triplets, 0)]  # only these labels need a weight
    num_triplets = losses.pairs.num_triplets()
    return Reduction((sums * weights).sum() / num_triplets.clamp(min=1), num_triplets, counts.sum())


def _threshold(reducer: _pml.ThresholdReducer, losses: HingeLosses) -> Reduction:
    low, high = reducer.low, reducer.high
    sums, counts = losses.sums(0.0 if low is None else max(0.0, low), high)
    num_active = num_counted = counts.sum()
    if (low is None or low < 0) and (high is None or high > 0):  # then the losses of zero count as well
        num_counted = num_active + losses.pairs.num_triplets() - losses.count()
    return Reduction(sums.sum() / num_counted.clamp(min=1), num_counted, num_active)


_REDUCTIONS: dict[type, Callable[..., Reduction]] = {
    _pml.AvgNonZeroReducer: _threshold,
    _pml.ClassWeightedReducer: _class_weighted,
    _pml.MeanReducer: _mean,
    _pml.SumReducer: _sum,
    _pml.ThresholdReducer: _threshold,
}
