"""The B x R matrix of distances: that of PML's `LpDistance`, at two thirds of its cost and with zeros where points coincide."""

from __future__ import annotations

from typing import Any

import torch

from ._pml import LpDistance
from .inputs import full_precision


def distance_matrix(distance: LpDistance, embeddings: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
    """What `distance(embeddings, ref_emb)` gives, up to rounding; `distance` is Euclidean, of power 1 or 2.

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
    query = distance.maybe_normalize(embeddings)
    ref = query if ref_emb is embeddings else distance.maybe_normalize(ref_emb)
    distance.set_default_stats(embeddings, ref_emb, query, ref)
    return _Distances.apply(query, None if ref is query else ref, distance.power)


class _Distances(torch.autograd.Function):
    """`d = |q|^2 + |r|^2 - 2 q.r`, or its root. Its gradient is `2 (q - r)`, or that divided by `2 d`."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, ref: torch.Tensor | None, power: int) -> torch.Tensor:
        others = query if ref is None else ref
        distances = torch.addmm(others.square().sum(dim=1), query, others.T, alpha=-2)
        distances.add_(query.square().sum(dim=1, keepdim=True))
        # The norms are 1 or less; equal points come out at a few units of rounding from zero.
        torch.threshold_(distances, 16 * torch.finfo(distances.dtype).eps, 0)
        if power == 1:
            distances.sqrt_()
        ctx.power = power
        ctx.save_for_backward(query, ref, distances if power == 1 else None)
        return distances

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, ref, distances = ctx.saved_tensors
        weights = 2 * gradient if distances is None else (gradient / distances).where(distances > 0, 0)
        with full_precision(gradient.device):
            if ref is None:  # a pair's two gradients are opposite, so that one product serves rows and columns
                return _pull(weights + weights.T, query, query), None, None
            of_ref = _pull(weights.T, ref, query) if ctx.needs_input_grad[1] else None
            return _pull(weights, query, ref), of_ref, None


def _pull(weights: torch.Tensor, points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The sum over j of `weights[i, j] (points[i] - others[j])`."""
    return weights.sum(dim=1, keepdim=True) * points - weights @ others
