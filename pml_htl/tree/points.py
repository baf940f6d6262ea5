"""Class means made ready for products in float32, whose scores rank by the true squared distance."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from .statistics import ClassStatistics

Lists: TypeAlias = tuple[np.ndarray, np.ndarray]  # for each class others, and how near they are


class ClassPoints(NamedTuple):
    """Class means made ready for products: `d(p,q) = 2 (level - score)` with `score = queries[p] @ base[q]`, symmetric.

    The mean squared norms `q_p` and `q_q` stand in two columns beside the means, so that a search by the largest score
    ranks by the true squared distance.

    queries, base: (C, D + 2) float32. level: the mean of all `q_c`.
    """

    queries: torch.Tensor
    base: torch.Tensor
    level: float

    def squared(self, scores: np.ndarray) -> np.ndarray:
        """Squared distances, float64, from scores."""
        return np.maximum(2 * (self.level - scores.astype(np.float64)), 0)

    def take(self, order: torch.Tensor) -> ClassPoints:
        """The same classes in another order, or some of them."""
        return self._replace(queries=self.queries[order], base=self.base[order])

    @property
    def means(self) -> torch.Tensor:
        """The class means (C, D)."""
        return self.base[:, :-2]

    @property
    def offsets(self) -> torch.Tensor:
        """(C,): the score of two classes is the product of their means and both offsets."""
        return self.base[:, -2]


def class_points(statistics: ClassStatistics, device: torch.device) -> ClassPoints:
    """The points of all classes, on `device`."""
    norms = statistics.mean_squared_norms
    level = norms.mean().item()
    columns = [statistics.means.float(), ((level - norms) / 2).float().unsqueeze(1), norms.new_ones(len(norms), 1).float()]
    base = torch.cat(columns, dim=1).to(device)
    queries = torch.cat([base[:, :-2], base[:, -1:], base[:, -2:-1]], dim=1)
    return ClassPoints(queries, base, level)
