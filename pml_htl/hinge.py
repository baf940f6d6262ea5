"""The arithmetic of triplets in a batch: pure functions on B x R matrices of query and reference samples.

No array here is larger than B x R, but for the list of triplets that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from ._pml import get_matches_and_diffs

Triplets: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def pair_masks(labels: torch.Tensor, ref_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs (B, R) are positive and which negative; a sample is no positive of itself. Both bool."""
    matches, differs = get_matches_and_diffs(labels, ref_labels)
    return matches.bool(), differs.bool()


def all_triplets(labels: torch.Tensor, ref_labels: torch.Tensor) -> Triplets:
    """Every (anchor, positive, negative), int64, in the order of PML's `get_all_triplets_indices`."""
    matches, differs = pair_masks(labels, ref_labels)
    return triplets_where(matches, lambda anchors, _: differs[anchors])


def triplets_where(matches: torch.Tensor, negatives: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Triplets:
    """The triplets of the positive pairs in `matches` (B, R), in the order anchor, positive, negative.

    `negatives(anchors, positives)` says for P pairs which of the R samples are their negatives: (P, R) bool. It is asked
    for B pairs at a time, so that memory stays at B x R and what is returned.
    """
    pairs = torch.where(matches)
    found = []
    for anchors, positives in zip(*(index.split(max(1, len(matches))) for index in pairs), strict=True):
        pair, negative = torch.where(negatives(anchors, positives))
        found.append((anchors[pair], positives[pair], negative))
    anchor, positive, negative = (torch.cat(indices) for indices in zip(*found, strict=True))
    return anchor, positive, negative


def margin_for_class_pairs(merge_thresholds: torch.Tensor, spreads: torch.Tensor, beta: float, power: int) -> torch.Tensor:
    """The dynamic violate margin, alpha, from squared distances `d_H` and `s` that broadcast (method, section 4).

    `power` 2: `beta + d_H - s`, for squared distances. `power` 1: `beta + sqrt(d_H) - sqrt(s)`, for plain ones.
    """
    if power == 1:
        merge_thresholds, spreads = merge_thresholds.sqrt(), spreads.sqrt()
    return beta + merge_thresholds - spreads
