"""Which classes the embeddings do not tell apart: those whose distance is small for their spreads."""

from __future__ import annotations

import numpy as np

# The columns of the table, and their types.
COLUMNS = np.dtype(
    [
        ("label_a", np.int64),
        ("label_b", np.int64),
        ("ratio", np.float64),
        ("distance", np.float64),
        ("spread_a", np.float64),
        ("spread_b", np.float64),
        ("level", np.int64),
    ]
)
SPREADLESS = np.finfo(np.float64).tiny  # in the place of spreads of zero, so that two classes at one point have ratio 0


def confusable_pairs(
    nearest: np.ndarray, distances: np.ndarray, spreads: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k pairs of classes with the smallest ratio of distance to mean spread, or all pairs of the lists.

    Args:
        nearest: (C, n) int64, positions of near classes of each class.
        distances: (C, n), their squared distances. spreads: (C,).

    Returns:
        pairs: (K, 2) int64, positions, the smaller first; smallest ratio first, equal ones in the order of positions.
        ratios: (K,) float64.
        places: (K,) where in `distances`, flattened, each pair stands.

    O(C n) time and memory.
    """
    ratios = distances / np.maximum((spreads[:, np.newaxis] + spreads[nearest]) / 2, SPREADLESS)
    ratios = ratios.ravel()
    candidates = np.arange(len(ratios))
    if 2 * k < len(ratios):  # a pair stands in the lists once or twice
        candidates = np.flatnonzero(ratios <= np.partition(ratios, 2 * k - 1)[2 * k - 1])
    own, others = candidates // nearest.shape[1], nearest.ravel()[candidates]
    pairs = np.stack([np.minimum(own, others), np.maximum(own, others)], axis=1)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    is_first = np.append(True, (np.diff(pairs[order], axis=0) != 0).any(axis=1))
    unique = order[is_first]  # in the order of positions, so that a stable sort leaves equal ratios in it
    unique = unique[np.argsort(ratios[candidates[unique]], kind="stable")][:k]
    return pairs[unique], ratios[candidates[unique]], candidates[unique]
