"""The B x R matrix of distances: that of PML's `LpDistance` at two thirds of its cost, and zero where points coincide."""

from __future__ import annotations

from typing import Any

import torch

from .._pml import LpDistance
from ..common.precision import full_precision
from ..common.transforms import transforms_active


def distance_matrix(distance: LpDistance, embeddings: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
    """What `distance(embeddings, ref_emb)` gives, up to rounding; `distance` is one that the margins are defined for.

    Args:
        embeddings, ref_emb: (B, D) and (R, D); one and the same object if there is no reference set, which saves a product.

    Returns:
        (B, R). Squared distances below the resolution of the float type count as zero, and the gradient of a plain distance
        of zero is zero, as in PML. A subclass of `LpDistance` is asked itself.
    """
    if type(distance) is not LpDistance:
        return distance(embeddings, ref_emb)
    distance.reset_stats()
    distance.check_shapes(embeddings, ref_emb)
    if distance.collect_stats:
        normalized = (distance.normalize(emb.detach()) for emb in (embeddings, ref_emb))
        distance.set_default_stats(embeddings, ref_emb, *normalized)
    distances = _by_operations if transforms_active() else _Distances.apply
    return distances(embeddings, None if ref_emb is embeddings else ref_emb, distance.power)


class _Distances(torch.autograd.Function):
    """`d = |q|^2 + |r|^2 - 2 q.r` of normalised `q` and `r`, or its root.

    The gradient with respect to q is `2 (q - r)`, or that divided by `2 d`. Its part along q does not turn the embedding, so
    only the sum over r is needed. It is made of the inputs alone, so that it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: torch.Tensor, ref_emb: torch.Tensor | None, power: int) -> torch.Tensor:
        distances = _squared(embeddings, ref_emb)
        if power == 1:
            distances.sqrt_()
        # Compiled by torch 2.11, a tensor that was changed in place would get no gradient; a view of it does.
        distances = distances.view_as(distances)
        ctx.save_for_backward(embeddings, ref_emb, distances if power == 1 else None)
        return distances

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        embeddings, ref_emb, distances = ctx.saved_tensors
        # By a threshold, which is several times faster than a mask.
        weights = gradient if distances is None else gradient / (2 * torch.threshold(distances, 0, torch.inf))
        query, norms = _normalize(embeddings)
        with full_precision(gradient.device):
            if ref_emb is None:  # the two gradients of a pair are alike, so that one product serves rows and columns
                return _turn((weights + weights.T) @ query, query, norms), None, None
            ref, ref_norms = _normalize(ref_emb)
            of_ref = _turn(weights.T @ query, ref, ref_norms) if ctx.needs_input_grad[1] else None
            return _turn(weights @ ref, query, norms), of_ref, None


def _by_operations(embeddings: torch.Tensor, ref_emb: torch.Tensor | None, power: int) -> torch.Tensor:
    """The same for torch.func, which derives plain operations; they take more time and memory.

    The function above would need a rule for forward mode, and torch.compile traces none that has one.
    """
    squared = _squared(embeddings, ref_emb)
    if power == 2:
        return squared
    coincide = squared == 0  # where the gradient of the root would be NaN
    return squared.masked_fill(coincide, 1).sqrt().masked_fill(coincide, 0)


def _squared(embeddings: torch.Tensor, ref_emb: torch.Tensor | None) -> torch.Tensor:
    """The squared distances; below the resolution they are zero."""
    query, _ = _normalize(embeddings)
    squares = query.square().sum(dim=1)
    ref, ref_squares = query, squares
    if ref_emb is not None:
        ref, _ = _normalize(ref_emb)
        ref_squares = ref.square().sum(dim=1)
    squared = torch.addmm(ref_squares, query, ref.T, alpha=-2).add_(squares.unsqueeze(1))
    # The norms are 1; equal points come out at a few units of rounding from zero, at more of them in many dimensions.
    resolution = max(16, query.shape[1] ** 0.5) * torch.finfo(squared.dtype).eps
    return torch.threshold_(squared, resolution, 0)


def _normalize(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors and norms (B, 1), at least 1e-12, as in PML."""
    norms = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True).clamp(min=1e-12)
    return embeddings / norms, norms


def _turn(pulls: torch.Tensor, points: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The gradient of embeddings from the weighted sums of what pulls at their unit vectors `points`."""
    along = (pulls * points).sum(dim=1, keepdim=True)
    return (along * points - pulls) * (2 / norms)
