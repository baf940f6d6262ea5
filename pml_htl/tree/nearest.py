"""The nearest classes of each class, found by products of class means in float32, block by block."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..common.precision import full_products
from .statistics import ClassStatistics

MAX_GPU_LIST = 2048  # of faiss
ROWS, COLUMNS = 1024, 32768  # of a block of scores: 128 MiB


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


def class_points(statistics: ClassStatistics, device: torch.device) -> ClassPoints:
    """The points of all classes, on `device`."""
    norms = statistics.mean_squared_norms
    level = norms.mean().item()
    columns = [statistics.means.float(), ((level - norms) / 2).float().unsqueeze(1), norms.new_ones(len(norms), 1).float()]
    base = torch.cat(columns, dim=1).to(device)
    queries = torch.cat([base[:, :-2], base[:, -1:], base[:, -2:-1]], dim=1)
    return ClassPoints(queries, base, level)


def nearest_classes(points: ClassPoints, k: int, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other classes of each, nearest first: positions (C, k) int64 and squared distances (C, k) float64.

    With `rows`, only those of some classes in a row, (rows, k).

    By faiss where it is installed (on the GPU if the points are there and faiss can), else by torch. Products are float32,
    so distances are right to about 1e-6, and classes nearer to each other than that come in any order. Memory is
    O(C (D + k)), time O(C^2 D).
    """
    found, scores = _search(points._replace(queries=points.queries[rows]), k + 1)
    own = found == np.arange(len(points.base))[rows, np.newaxis]
    own[~own.any(axis=1), -1] = True  # it is crowded out by others at the same place
    return found[~own].reshape(-1, k), points.squared(scores[~own].reshape(-1, k))


def _search(points: ClassPoints, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest scores of each query, largest first: columns (queries, k) and scores (queries, k) float32."""
    try:
        import faiss
    except ImportError:
        return search_by_torch(points, k)
    on_gpu = points.base.device.type == "cuda"
    if on_gpu and (faiss.get_num_gpus() == 0 or k > MAX_GPU_LIST):  # 0: it is faiss-cpu
        return search_by_torch(points, k)
    queries, base = points.queries.cpu().numpy(), points.base.cpu().numpy()
    if on_gpu:
        resources, device = faiss.StandardGpuResources(), points.base.device.index or 0
        scores, found = faiss.knn_gpu(resources, queries, base, k, metric=faiss.METRIC_INNER_PRODUCT, device=device)
    else:
        scores, found = faiss.knn(queries, base, k, metric=faiss.METRIC_INNER_PRODUCT)
    return found, scores


def search_by_torch(points: ClassPoints, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The same in plain torch, on the device of the points."""
    num_rows, num_classes = len(points.queries), len(points.base)
    found, scores = np.empty((num_rows, k), dtype=np.int64), np.empty((num_rows, k), dtype=np.float32)
    with full_products(points.base.device):
        for start in range(0, num_rows, ROWS):
            queries = points.queries[start : start + ROWS]
            best: list[torch.Tensor] = []
            columns: list[torch.Tensor] = []
            for first in range(0, num_classes, COLUMNS):
                block = queries @ points.base[first : first + COLUMNS].T
                values, places = block.topk(min(k, block.shape[1]))
                best.append(values)
                columns.append(places + first)
            values, places = torch.cat(best, dim=1).topk(k)
            scores[start : start + ROWS] = values.cpu().numpy()
            found[start : start + ROWS] = torch.cat(columns, dim=1).gather(1, places).cpu().numpy()
    return found, scores
