"""The arithmetic of the loss: pure functions on B x R matrices of query and reference samples.

The losses of the triplets are never listed: from distances and margins follow the sum and the number of those that count,
with their gradient, in B x R memory.
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.precision import widest_float
from ..common.transforms import transforms_active
from .classes import ClassPairs
from .triplets import Pairs, Positives, Rows

# Up to so many positives of an anchor, comparing each with all negatives is faster than a search for each negative.
MAX_COMPARISONS = 32
# Rows are taken in blocks: on the CPU so that comparisons stay in the cache, elsewhere so that memory is bounded.
BLOCK_ELEMENTS = 2**18
BLOCK_ELEMENTS_OF_ACCELERATOR = 2**20


def hinge_sums(
    distances: torch.Tensor,
    margins: torch.Tensor,
    pairs: Pairs | ClassPairs,
    floor: float = 0.0,
    ceiling: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each anchor, the violations `d(a,p) - d(a,n) + alpha(a,n)` above `floor` and below `ceiling`.

    Args:
        distances: (B, R); the gradient is that of the sums with respect to them.
        margins: of the same float type, as the pairs take them: (B, R) or, for `ClassPairs`, (K, K).
        pairs: the triplets.
        floor: at least 0.

    Returns:
        Their sums (B,) and their numbers (B,) int64. The sum is NaN if a distance of a positive or negative is.

    For t positives of an anchor time is O(B R t) while they are few, else O(B R log t); where their number is not known
    they are sorted among all R. Memory is a few B x R, and on an accelerator up to 100 MiB for a block of rows.
    """
    if not torch.is_grad_enabled():
        distances = distances.detach()  # or the gradient would be computed all the same
    if not transforms_active():
        return _HingeSums.apply(distances, margins, pairs, floor, ceiling)
    values = distances.detach()
    losses, counts, gradient = _sum_up(values, margins, pairs, floor, ceiling, with_gradient=True)
    assert gradient is not None
    # Between their kinks the sums are linear, so that their first derivative, as a constant, is all that there is to tell.
    moves = (distances - values).where(gradient != 0, 0)
    return losses + (moves * gradient).sum(dim=1), counts


class _HingeSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        distances: torch.Tensor,
        margins: torch.Tensor,
        pairs: Pairs | ClassPairs,
        floor: float,
        ceiling: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with_gradient = ctx.needs_input_grad[0]
        losses, counts, gradient = _sum_up(distances, margins, pairs, floor, ceiling, with_gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(counts)
        return losses, counts

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_losses.unsqueeze(1) * gradient, None, None, None, None


def _sum_up(
    distances: torch.Tensor,
    margins: torch.Tensor,
    pairs: Pairs | ClassPairs,
    floor: float,
    ceiling: float | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The sums, the numbers, and by request the gradient (B, R) of each anchor's sum with respect to its distances."""
    positives = pairs.positives_of(distances)
    needed_by = pairs.needed(distances, margins)
    blocks = _blocks(distances, pairs)
    if len(blocks) == 1:
        losses, violated, violating = _sum_block(positives, needed_by(slice(None)), pairs, slice(None), floor, ceiling)
        gradient = -violating if with_gradient else None
    else:
        losses, violated = distances.new_empty(len(distances)), torch.zeros_like(positives.distances)
        gradient = torch.empty_like(distances) if with_gradient else None
        for rows, most in blocks:
            block = positives.take(rows, most)
            losses[rows], violated[rows, :most], violating = _sum_block(block, needed_by(rows), pairs, rows, floor, ceiling)
            if gradient is not None:
                gradient[rows] = -violating
    if gradient is not None:
        gradient.scatter_add_(1, positives.columns, violated)
    return losses, violated.sum(dim=1, dtype=widest_float(violated.device)).long(), gradient


def _sum_block(
    positives: Positives,
    needed: torch.Tensor,
    pairs: Pairs | ClassPairs,
    rows: Rows,
    floor: float,
    ceiling: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some rows: their sums (b,), how many negatives each positive violates (b, t), and by how many positives each negative
    is violated (b, R), of one float type.

    `needed` (b, R) is what a positive must exceed to violate, FAR where there is no negative.
    """
    times = pairs.times(rows, needed.dtype)
    reach = positives.distances
    by_comparing = pairs.most_positives is not None and pairs.count_once and reach.shape[1] <= MAX_COMPARISONS
    count = _count_by_comparing if by_comparing else _count_by_searching
    violated, violating = count(positives, needed + floor if floor else needed, times)
    if ceiling is not None:
        too_far = count(positives, needed + max(floor, ceiling), times, or_equal=ceiling > floor)
        violated, violating = violated - too_far[0], violating - too_far[1]
    # A violation is what the positive exceeds the negative by. Both are measured from the farthest positive, so that no
    # digits are lost: violations are about as large as these differences.
    farthest = reach.amax(dim=1, keepdim=True)
    losses = (violating * (farthest - needed)).sum(dim=1) - (violated * (farthest - reach)).sum(dim=1)
    return losses, violated, violating


def _count_by_comparing(
    positives: Positives, needed: torch.Tensor, times: torch.Tensor | None, or_equal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares each positive of an anchor with all its negatives, for the last two results of `_sum_block`.

    Args:
        needed: (b, R), what a positive must exceed (or, by request, equal).
        times: None; all pairs count once.
    """
    reach, violates = positives.distances.T.unsqueeze(2), torch.ge if or_equal else torch.gt
    if transforms_active():  # which know no `out`
        active = violates(reach, needed).to(needed.dtype)
    else:  # as numbers, which is several times faster than as a mask
        active = violates(reach, needed, out=needed.new_empty(len(reach), *needed.shape))
    return active.sum(dim=2).T, active.sum(dim=0)


def _count_by_searching(
    positives: Positives, needed: torch.Tensor, times: torch.Tensor | None, or_equal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_count_by_comparing`: sorts the positives of an anchor, so that those that violate a negative are the last ones.

    `times` (b, R): how often each negative counts; None if all pairs count once.
    """
    reach, order = positives.distances.sort(dim=1)
    first = torch.searchsorted(reach, needed, right=not or_equal)  # of the positives that violate
    weights = torch.ones_like(reach) if positives.weights is None else positives.weights.gather(1, order)
    if times is None:  # then positives weigh 1, and free places, which come first, violate nothing
        violating = (reach.shape[1] - first).to(needed.dtype)
        times = violating.new_ones(()).expand(violating.shape)
    else:
        wide = widest_float(needed.device)  # running sums lose digits where few of many count
        times, weights = times.to(wide), weights.to(wide)
        running_weights = _running_sum(weights)
        violating = running_weights[:, -1:] - running_weights.gather(1, first)
    ends = torch.nn.functional.pad(torch.zeros_like(weights), (0, 1)).scatter_add_(1, first, times)
    violated = weights.scatter(1, order, weights * _running_sum(ends)[:, 1:-1])  # back to their columns, all of them
    return violated.to(needed.dtype), (times * violating).to(needed.dtype)


def _running_sum(values: torch.Tensor) -> torch.Tensor:
    """(b, t + 1): the sum of the first 0, 1, ... t values of each row."""
    if torch.are_deterministic_algorithms_enabled():  # on CUDA torch's own is not
        span = 1  # how many values each place has the sum of: its own and those before it
        while span < values.shape[1]:
            values = torch.cat([values[:, :span], values[:, span:] + values[:, :-span]], dim=1)
            span *= 2
    else:
        values = values.cumsum(dim=1)
    return torch.nn.functional.pad(values, (1, 0))


def _blocks(distances: torch.Tensor, pairs: Pairs | ClassPairs) -> list[tuple[Rows, int | None]]:
    """The rows of each block, and how many places their positives take (None: all there are)."""
    elements = BLOCK_ELEMENTS if distances.device.type == "cpu" else BLOCK_ELEMENTS_OF_ACCELERATOR
    num_rows, row = len(distances), max(1, distances.shape[1])
    if pairs.most_positives is None or not pairs.count_once:
        return [(rows, None) for rows in _ranges(num_rows, elements // row)]
    if pairs.are_alike:
        most = pairs.most_positives
        return [(rows, most) for rows in _ranges(num_rows, elements // (row * (most if most <= MAX_COMPARISONS else 1)))]
    # Anchors with about as many positives go together, so that a few of them do not cost all.
    numbers, order = pairs.num_positives.sort(descending=True, stable=True)
    counts, start = numbers.clamp(min=1).tolist(), 0
    found: list[tuple[Rows, int | None]] = []
    while start < num_rows:
        most = counts[start]
        end = start + max(1, elements // (row * (most if most <= MAX_COMPARISONS else 1)))
        found.append((order[start:end], most))
        start = end
    return found


def _ranges(length: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, start + step) for start in range(0, length, step)]


def margin_for_class_pairs(merge_distances: torch.Tensor, spreads: torch.Tensor, beta: float, power: int) -> torch.Tensor:
    """The dynamic violate margin, alpha, from squared distances `d_H` and `s` that broadcast (method, section 4).

    `power` 2: `beta + d_H - s`, for squared distances. `power` 1: `beta + sqrt(d_H) - sqrt(s)`, for plain ones.
    """
    if power == 1:
        merge_distances, spreads = merge_distances.sqrt(), spreads.sqrt()
    return beta + (merge_distances - spreads)
