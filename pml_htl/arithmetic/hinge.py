"""The arithmetic of the loss: pure functions on B x R matrices of query and reference samples.

The losses of the triplets are never listed: from distances and margins follow the sum and the number of those that count,
with their gradient, in B x R memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..common.precision import widest_float
from ..common.transforms import transforms_active
from .triplets import Pairs

# Up to so many positives of an anchor, comparing each with all negatives is faster than a search for each negative.
MAX_COMPARISONS = 64
# Rows are taken in blocks: on the CPU so that comparisons stay in the cache, elsewhere so that memory is bounded.
BLOCK_ELEMENTS = 2**17
BLOCK_ELEMENTS_OF_ACCELERATOR = 2**20


def hinge_sums(
    distances: torch.Tensor, margins: torch.Tensor, pairs: Pairs, floor: float = 0.0, ceiling: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each anchor, the violations `d(a,p) - d(a,n) + alpha(a,n)` above `floor` and below `ceiling`.

    Args:
        distances, margins: (B, R) of one float type; the gradient is that of the sums with respect to the distances.
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
        ctx: Any, distances: torch.Tensor, margins: torch.Tensor, pairs: Pairs, floor: float, ceiling: float | None
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
    distances: torch.Tensor, margins: torch.Tensor, pairs: Pairs, floor: float, ceiling: float | None, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The sums, the numbers, and by request the gradient (B, R) of each anchor's sum with respect to its distances."""
    positives = _positives_of(pairs, distances)
    once = pairs.positives.dtype == pairs.negatives.dtype == torch.bool
    few = pairs.most_positives is not None and pairs.most_positives <= MAX_COMPARISONS
    summed = _by_comparing if few else _by_searching
    losses = distances.new_empty(len(distances))
    violated = torch.empty_like(positives.distances)
    gradient = torch.empty_like(distances) if with_gradient else None
    for rows in _row_blocks(distances, positives.distances.shape[1] if few else 1):
        negatives = pairs.negatives[rows]
        needed = torch.where(negatives.bool(), distances[rows] - margins[rows], torch.inf)
        block = _Positives(*(part[rows] for part in positives))
        times = None if once else negatives.to(needed.dtype)
        losses[rows], violated[rows], violating = summed(block, needed, times, floor, ceiling)
        if gradient is not None:
            gradient[rows] = -violating  # which is double where running sums were
    if gradient is not None:
        gradient.scatter_add_(1, positives.columns, violated)
    counts = violated.sum(dim=1, dtype=widest_float(violated.device)).nan_to_num_(0).long()
    return losses, counts, gradient


class _Positives(NamedTuple):
    """The positives of anchors side by side, (B, t) for at most t of them; a free place is at -inf and weighs 0.

    columns: int64, which of the R samples. distances. weights: how often each counts, of the distances' type.
    """

    columns: torch.Tensor
    distances: torch.Tensor
    weights: torch.Tensor


def _positives_of(pairs: Pairs, distances: torch.Tensor) -> _Positives:
    """t is the most that an anchor has, or R where that is not known, so that no shape depends on the data."""
    matches = pairs.positives
    if pairs.most_positives is None:
        columns = torch.arange(distances.shape[1], device=distances.device).expand(distances.shape)
        return _Positives(columns, distances.where(matches > 0, -torch.inf), matches.to(distances.dtype))
    numbers = matches.bool().sum(dim=1, keepdim=True, dtype=torch.int32)
    taken = torch.arange(pairs.most_positives, device=numbers.device) < numbers
    columns = torch.zeros_like(taken, dtype=torch.int64).masked_scatter_(taken, matches.nonzero()[:, 1])
    weights = matches.gather(1, columns).to(distances.dtype) * taken
    return _Positives(columns, distances.gather(1, columns).where(taken, -torch.inf), weights)


def _by_comparing(
    positives: _Positives, needed: torch.Tensor, times: torch.Tensor | None, floor: float, ceiling: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compares each positive of an anchor with all its negatives.

    Args:
        needed: (b, R), what a positive must exceed to violate; infinite where there is no negative.
        times: (b, R), how often each negative counts; None if all pairs count once.

    Returns:
        The sums of violations (b,), how many negatives each positive violates (b, t), and by how many positives each
        negative is violated (b, R), all of one float type: float arithmetic is several times faster than masks.
    """
    violations = positives.distances.unsqueeze(2) - needed.unsqueeze(1)  # (b, t, R)
    torch.threshold_(violations, floor, 0)
    if ceiling is not None:
        torch.threshold_(violations.neg_(), -ceiling, 0).neg_()
    if times is None:
        losses = violations.sum(dim=(1, 2))
        active = violations.sign_()
    else:
        weights = positives.weights.unsqueeze(2) * times.unsqueeze(1)
        losses = (violations * weights).sum(dim=(1, 2))
        active = violations.sign_().mul_(weights)
    return losses, active.sum(dim=2), active.sum(dim=1)


def _by_searching(
    positives: _Positives, needed: torch.Tensor, times: torch.Tensor | None, floor: float, ceiling: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_by_comparing`: sorts the positives of an anchor, so that those that violate a negative are a range of them."""
    wide = widest_float(needed.device)  # running sums lose digits where few of many count
    reach, order = positives.distances.sort(dim=1)
    weights = positives.weights.gather(1, order).to(wide)
    running_weights = _running_sum(weights)
    running_sums = _running_sum((weights * reach).where(weights > 0, 0))

    first = torch.searchsorted(reach, needed + floor, right=True)
    if ceiling is None:
        last = first.new_full((), reach.shape[1]).expand(first.shape)
    else:
        last = torch.maximum(first, torch.searchsorted(reach, needed + ceiling))
    violating = running_weights.gather(1, last) - running_weights.gather(1, first)
    losses = running_sums.gather(1, last) - running_sums.gather(1, first)
    losses -= (violating * needed).where(needed != torch.inf, 0)

    times = losses.new_ones(()).expand(losses.shape) if times is None else times.to(wide)
    steps = torch.zeros_like(running_sums).scatter_add_(1, first, times).scatter_add_(1, last, -times)
    violated = weights.scatter(1, order, weights * _running_sum(steps)[:, 1:-1])  # back to their columns, all of them
    return (times * losses).sum(dim=1), violated, times * violating


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


def _row_blocks(matrix: torch.Tensor, numbers_per_element: int) -> list[slice]:
    num_rows, num_columns = matrix.shape
    elements = BLOCK_ELEMENTS if matrix.device.type == "cpu" else BLOCK_ELEMENTS_OF_ACCELERATOR
    step = max(1, elements // max(1, num_columns * numbers_per_element))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def margin_for_class_pairs(
    merge_distances: torch.Tensor, spreads: torch.Tensor, beta: float, power: int, tree_weight: float = 1.0
) -> torch.Tensor:
    """The dynamic violate margin, alpha, from squared distances `d_H` and `s` that broadcast (method, section 4).

    `power` 2: `beta + tree_weight (d_H - s)`, for squared distances. `power` 1: `beta + tree_weight (sqrt(d_H) - sqrt(s))`,
    for plain ones.
    """
    if power == 1:
        merge_distances, spreads = merge_distances.sqrt(), spreads.sqrt()
    return beta + tree_weight * (merge_distances - spreads)
