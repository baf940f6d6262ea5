"""The arithmetic of the loss: pure functions on B x R matrices of query and reference samples.

The losses of the triplets are never listed: from distances and margins follow the sum and the number of those that count,
with their gradient, in B x R memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .triplets import Pairs

# Up to so many positives of an anchor, comparing each with all negatives is faster than a search for each negative.
MAX_COMPARISONS = 64
# On the CPU rows are taken together as long as a block of them stays in the cache.
BLOCK_ELEMENTS = 2**16


def hinge_sums(
    distances: torch.Tensor, margins: torch.Tensor, pairs: Pairs, floor: float = 0.0, ceiling: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each anchor, the violations `d(a,p) - d(a,n) + alpha(a,n)` above `floor` and below `ceiling`.

    Args:
        distances, margins: (B, R) of one float type; the gradient is that of the sums with respect to the distances.
        pairs: the triplets.
        floor: at least 0.

    Returns:
        Their sums (B,) and their numbers (B,) int64. NaN distances make the sum NaN and count for nothing.

    For t positives of an anchor time is O(B R t) while they are few, else O(B R log t); where their number is not known
    they are sorted among all R. Memory is a few B x R.
    """
    if not torch.is_grad_enabled():
        distances = distances.detach()  # or the gradient would be computed all the same
    return _HingeSums.apply(distances, margins, pairs, floor, ceiling)


class _HingeSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, distances: torch.Tensor, margins: torch.Tensor, pairs: Pairs, floor: float, ceiling: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        few = pairs.most_positives is not None and pairs.most_positives <= MAX_COMPARISONS
        summed = _by_comparing if few else _by_searching
        gradient = torch.empty_like(distances) if ctx.needs_input_grad[0] else None
        losses = distances.new_zeros(len(distances))
        counts = torch.zeros_like(losses, dtype=torch.int64)
        for rows in _row_blocks(distances):
            positives = _positives_of(pairs.positives[rows], distances[rows], pairs.most_positives)
            negatives = pairs.negatives[rows]
            times = None if negatives.dtype == torch.bool else negatives
            needed = torch.where(negatives.bool(), distances[rows] - margins[rows], torch.inf)
            row_gradient = None if gradient is None else gradient[rows].zero_()
            losses[rows], counts[rows] = summed(positives, needed, times, floor, ceiling, row_gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(counts)
        return losses, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_losses: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_losses.unsqueeze(1) * gradient, None, None, None, None


class _Positives(NamedTuple):
    """The positives of b anchors side by side, in at most t of (b, t) places; a free place is at -inf and weighs 0.

    columns: int64, which of the R samples. distances. weights: how often each counts, of the distances' type.
    """

    columns: torch.Tensor
    distances: torch.Tensor
    weights: torch.Tensor


def _positives_of(matches: torch.Tensor, distances: torch.Tensor, most: int | None) -> _Positives:
    """From (b, R); t is `most`, or R where that is not known, so that no shape depends on the data."""
    if most is None:
        columns = torch.arange(distances.shape[1], device=distances.device).expand(distances.shape)
        return _Positives(columns, torch.where(matches > 0, distances, -torch.inf), matches.to(distances.dtype))
    rows, others = matches.nonzero(as_tuple=True)
    places = torch.arange(len(rows)) - torch.searchsorted(rows, rows)  # how many of the same row are before it
    columns = rows.new_zeros(len(distances), most)
    columns[rows, places] = others
    weights = distances.new_zeros(columns.shape)
    weights[rows, places] = matches[rows, others].to(weights.dtype)
    return _Positives(columns, torch.where(weights > 0, distances.gather(1, columns), -torch.inf), weights)


def _by_comparing(
    positives: _Positives,
    needed: torch.Tensor,
    times: torch.Tensor | None,
    floor: float,
    ceiling: float | None,
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the positives of all anchors one after the other and compares each with all negatives.

    Everything is float arithmetic in one buffer, which is several times faster than masks.
    """
    violations = torch.empty_like(needed)
    losses = needed.new_zeros(len(needed))
    counts = torch.empty_like(positives.weights)
    for place, weight in enumerate(positives.weights.unbind(1)):
        torch.sub(positives.distances[:, place : place + 1], needed, out=violations)
        torch.threshold_(violations, floor, 0)
        if ceiling is not None:
            torch.threshold_(violations.neg_(), -ceiling, 0).neg_()
        losses += weight * (violations if times is None else violations * times).sum(dim=1)
        active = violations.sign_() if times is None else violations.sign_().mul_(times)
        counts[:, place] = weight * active.sum(dim=1)
        if gradient is not None:
            gradient.addcmul_(active, weight.unsqueeze(1), value=-1)
    if gradient is not None:
        gradient.scatter_add_(1, positives.columns, counts)
    return losses, counts.sum(dim=1).nan_to_num(0).long()


def _by_searching(
    positives: _Positives,
    needed: torch.Tensor,
    times: torch.Tensor | None,
    floor: float,
    ceiling: float | None,
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the positives of each anchor, so that those that violate a negative are a range of them, found by searching."""
    # Running sums lose digits where few of many count, so they are double (where there is double).
    wide = torch.float32 if needed.device.type == "mps" else torch.float64
    reach, order = positives.distances.sort(dim=1)
    weights = positives.weights.gather(1, order).to(wide)
    running_weights = _running_sum(weights)
    running_sums = _running_sum(torch.where(weights > 0, weights * reach, 0))

    first = torch.searchsorted(reach, needed + floor, right=True)
    last = torch.full_like(first, reach.shape[1]) if ceiling is None else torch.searchsorted(reach, needed + ceiling)
    last = torch.maximum(first, last)
    counts = running_weights.gather(1, last) - running_weights.gather(1, first)  # how many violate each negative
    losses = running_sums.gather(1, last) - running_sums.gather(1, first) - torch.where(counts > 0, counts * needed, 0)

    times = torch.ones_like(counts) if times is None else times.to(wide)
    steps = torch.zeros_like(running_sums).scatter_add_(1, first, times).scatter_add_(1, last, -times)
    violated = weights * steps.cumsum(dim=1)[:, :-1]  # by each positive
    if gradient is not None:
        gradient.sub_(times * counts)
        gradient.scatter_add_(1, positives.columns.gather(1, order), violated.to(gradient.dtype))
    return (times * losses).sum(dim=1).to(needed.dtype), violated.sum(dim=1).long()


def _running_sum(values: torch.Tensor) -> torch.Tensor:
    """(b, t + 1): the sum of the first 0, 1, ... t values of each row."""
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))


def _row_blocks(matrix: torch.Tensor) -> Iterator[slice]:
    num_rows, num_columns = matrix.shape
    step = max(1, BLOCK_ELEMENTS // max(1, num_columns)) if matrix.device.type == "cpu" else max(1, num_rows)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def margin_for_class_pairs(merge_thresholds: torch.Tensor, spreads: torch.Tensor, beta: float, power: int) -> torch.Tensor:
    """The dynamic violate margin, alpha, from squared distances `d_H` and `s` that broadcast (method, section 4).

    `power` 2: `beta + d_H - s`, for squared distances. `power` 1: `beta + sqrt(d_H) - sqrt(s)`, for plain ones.
    """
    if power == 1:
        merge_thresholds, spreads = merge_thresholds.sqrt(), spreads.sqrt()
    return beta + merge_thresholds - spreads
