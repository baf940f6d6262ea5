"""Other ways to draw batches by the tree, to be compared with that of the package."""

from __future__ import annotations

import numpy as np
import torch

from pml_htl import AnchorNeighborSampler


class ApartSampler(AnchorNeighborSampler):
    """Neighbours that are no nearer than samples of one class are (that meet at level 0) come after all others.

    If classes are two by mistake, or half of a class has a wrong label, such are their nearest.
    """

    def _neighbors_by_class(self, nearest: np.ndarray) -> np.ndarray:
        found = super()._neighbors_by_class(nearest)
        labels = torch.from_numpy(self.classes)
        too_near = self.tree.merge_levels(labels.unsqueeze(1), labels[torch.from_numpy(found)]).numpy() == 0
        return np.take_along_axis(found, np.argsort(too_near, axis=1, kind="stable"), axis=1)


class RatioSampler(AnchorNeighborSampler):
    """Neighbours in the order of their distance over the mean of both spreads, as in `ClassTree.confusable`."""

    def _neighbors_by_class(self, nearest: np.ndarray) -> np.ndarray:
        found = super()._neighbors_by_class(nearest)
        return np.take_along_axis(found, np.argsort(self._ratios(found), axis=1, kind="stable"), axis=1)

    def _ratios(self, found: np.ndarray) -> np.ndarray:
        """(C, k), of classes that all have samples."""
        spreads = self.tree.part("spreads").cpu().numpy()
        return self.tree.part("nearest_distances").cpu().numpy() / ((spreads[:, np.newaxis] + spreads[found]) / 2)


class DistinctSampler(RatioSampler):
    """Neighbours whose ratio is near that of two halves of a class, 1, come after all others.

    Such halves meet at level 0 about every other time, as `d_0` is their expected distance.
    """

    least_ratio = 1.3

    def _neighbors_by_class(self, nearest: np.ndarray) -> np.ndarray:
        found = AnchorNeighborSampler._neighbors_by_class(self, nearest)
        too_near = self._ratios(found) < self.least_ratio
        return np.take_along_axis(found, np.argsort(too_near, axis=1, kind="stable"), axis=1)


class HardAnchorSampler(RatioSampler):
    """Neighbours as of the package; a round has half of the classes as anchors, rather those that are told apart least."""

    def _neighbors_by_class(self, nearest: np.ndarray) -> np.ndarray:
        return AnchorNeighborSampler._neighbors_by_class(self, nearest)

    def _new_round(self, generator: np.random.Generator) -> np.ndarray:
        if not self.tree.is_fitted:
            return super()._new_round(generator)
        # Without replacement, by Efraimidis and Spirakis: the largest of random numbers to the power of 1 / weight.
        weights = self._ratios(self.tree.part("nearest_classes").cpu().numpy()).min(axis=1) ** -2.0
        order = np.argsort(np.log(generator.random(len(weights))) / weights)[::-1]
        return order[: max(len(order) // 2, 2 * self.num_anchors * self.neighborhood_size)]


SAMPLERS = {
    "neighbors": AnchorNeighborSampler,
    "neighbors-apart": ApartSampler,
    "neighbors-distinct": DistinctSampler,
    "neighbors-ratio": RatioSampler,
    "neighbors-hard": HardAnchorSampler,
}
