"""The smooth form of the loss: one loss for each anchor and positive, in which the nearest negatives count most.

Pure functions. `temperature * log(1 + sum over n of exp(v / temperature))` over the violations `v = d(a,p) - d(a,n) +
alpha(a,n)` of an anchor and a positive lies above the largest `max(0, v)`, and comes down to it as the temperature goes to
zero.
"""

from __future__ import annotations

import torch

from .classes import ClassPairs
from .triplets import Pairs, Triplets


def soft_losses_of_pairs(
    distances: torch.Tensor, margins: torch.Tensor, pairs: Pairs | ClassPairs, temperature: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Of all positive pairs whose anchor has a negative, without a list of triplets: O(B R) time and memory.

    Args:
        distances: (B, R).
        margins: as the pairs take them.
        pairs: which are positive and which negative; those that are there k times count k times.

    Returns:
        The losses (P,), and the anchor and the positive of each, (P,) int64.
    """
    # The positive's distance is the same for all negatives, so that one sum over them serves all positives.
    pulls = pairs.needed(distances, margins)(slice(None)) / -temperature
    times = pairs.times(slice(None), pulls.dtype)
    pull = (pulls if times is None else pulls + times.clamp(min=1).log()).logsumexp(dim=1)
    anchors, positives = pairs.listed()
    return _soft(distances[anchors, positives] / temperature + pull[anchors], temperature), (anchors, positives)


def soft_losses_of_triplets(
    violations: torch.Tensor, triplets: Triplets, num_refs: int, temperature: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The same from a list of triplets with their violations (T,): a loss for each different anchor and positive."""
    anchors, positives, _ = triplets
    pair, place = (anchors * num_refs + positives).unique(return_inverse=True)
    scaled = violations / temperature
    largest = scaled.detach().new_full((len(pair),), -torch.inf).scatter_reduce_(0, place, scaled.detach(), "amax")
    sums = torch.zeros_like(largest).index_add(0, place, (scaled - largest[place]).exp())
    return _soft(largest + sums.log(), temperature), (pair // num_refs, pair % num_refs)


def _soft(logarithm_of_sum: torch.Tensor, temperature: float) -> torch.Tensor:
    return temperature * torch.logaddexp(logarithm_of_sum, torch.zeros_like(logarithm_of_sum))
