"""The arithmetic of the loss: pure functions on B x R matrices of query and reference samples.

The losses of the triplets are never listed: from distances and margins follow the sum and the number of those that count,
with their gradient, in B x R memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .triplets import Pairs

# Up to so many positives of an anchor, one comparison with all negatives for each is faster than sorting.
MAX_COMPARISONS = 128
# On the CPU rows are taken together as long as a block of them stays in the cache.
BLOCK_ELEMENTS = 2**17


def hinge_sums(
    distances: torch.Tensor, margins: torch.Tensor, pairs: Pairs, floor: float = 0.0, ceiling: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each anchor, the violations `d(a,p) - d(a,n) + alpha(a,n)` above `floor` and below `ceiling`.

    Args:
        distances, margins: (B, R) of one float type; the gradient is that of the sums with respect to the distances.
        pairs: the triplets.
        floor: at least 0.

    Returns:
        Their sums (B,) and their numbers (B,) int64.

    Time is O(B R t) for t positives of an anchor, or O(B R log R) by sorting if they are many or their number is not
    known; memory a few B x R.
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
        summed = _by_comparing if few else _by_sorting
        gradient = torch.zeros_like(distances) if ctx.needs_input_grad[0] else None
        losses = distances.new_zeros(len(distances))
        counts = torch.zeros_like(losses, dtype=torch.int64)
        for rows in _row_blocks(distances):
            block = Pairs(pairs.positives[rows], pairs.negatives[rows], pairs.most_positives)
            row_gradient = None if gradient is None else gradient[rows]
            losses[rows], counts[rows] = summed(distances[rows], margins[rows], block, floor, ceiling, row_gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(counts)
        return losses, counts

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_losses.unsqueeze(1) * gradient, None, None, None, None


def _by_comparing(
    distances: torch.Tensor,
    margins: torch.Tensor,
    pairs: Pairs,
    floor: float,
    ceiling: float | None,
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the positives of all anchors one after the other and compares each with all negatives."""
    most = pairs.most_positives or 0
    needed = torch.where(pairs.negatives > 0, distances - margins, torch.inf)  # a positive farther than this violates
    there, columns = (pairs.positives > 0).byte().topk(most)  # (B, t)
    to_positives = torch.where(there > 0, distances.gather(1, columns), -torch.inf)
    weights = pairs.positives.gather(1, columns).long()

    losses = distances.new_zeros(len(distances))
    counts = weights.new_zeros(len(distances))
    for place in range(most):
        violations = to_positives[:, place : place + 1] - needed
        active = violations > floor if ceiling is None else (violations > floor) & (violations < ceiling)
        violations = torch.where(active, violations, 0)
        weight = weights[:, place]
        if pairs.negatives.dtype != torch.bool:
            violations = violations * pairs.negatives
            active = active * pairs.negatives
        active_negatives = active.sum(dim=1)
        losses += weight * violations.sum(dim=1)
        counts += weight * active_negatives
        if gradient is not None:
            gradient -= active * weight.unsqueeze(1).to(gradient.dtype)
            gradient.scatter_add_(
                1, columns[:, place : place + 1], (weight * active_negatives).unsqueeze(1).to(gradient.dtype)
            )
    return losses, counts


def _by_sorting(
    distances: torch.Tensor,
    margins: torch.Tensor,
    pairs: Pairs,
    floor: float,
    ceiling: float | None,
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the negatives of each anchor, so that the sum over those that a positive violates is one of running sums.

    No shape depends on the data, so that nothing waits for the device.
    """
    positives = pairs.positives * distances.isfinite()
    needed = torch.where(pairs.negatives > 0, distances - margins, torch.inf)
    below, weights = _sorted_with_weights(needed, pairs.negatives)
    # Running sums lose digits where few of many count, so they are double (where there is double).
    wide = torch.float32 if distances.device.type == "mps" else torch.float64
    running_weights = _running_sum(weights)
    running_sums = _running_sum(torch.where(weights > 0, weights * below.to(wide), 0))
    last = torch.searchsorted(below, distances - floor)
    first = torch.zeros_like(last) if ceiling is None else torch.searchsorted(below, distances - ceiling, right=True)
    last = torch.maximum(first, last)
    counts = running_weights.gather(1, last) - running_weights.gather(1, first)
    sums = counts * distances.to(wide) - (running_sums.gather(1, last) - running_sums.gather(1, first))
    if gradient is not None:
        gradient += positives * counts
        reach, weights = _sorted_with_weights(torch.where(positives > 0, distances, torch.inf), positives)
        running_weights = _running_sum(weights)
        first = torch.searchsorted(reach, needed + floor, right=True)
        last = torch.full_like(first, reach.shape[1]) if ceiling is None else torch.searchsorted(reach, needed + ceiling)
        last = torch.maximum(first, last)
        gradient -= pairs.negatives * (running_weights.gather(1, last) - running_weights.gather(1, first))
    losses = torch.where(positives > 0, positives * sums, 0).sum(dim=1)
    return losses.to(distances.dtype), (positives * counts).sum(dim=1)


def _sorted_with_weights(values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ordered, order = values.sort(dim=1)
    return ordered, weights.gather(1, order).long()


def _running_sum(values: torch.Tensor) -> torch.Tensor:
    """(B, R + 1): the sum of the first 0, 1, ... R values of each row."""
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
