"""How near the classes of a tree are to each other: what might tell beforehand whether sampling near ones pays."""

from __future__ import annotations

from typing import Any

import torch

from pml_htl import ClassTree

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def nearness(tree: ClassTree) -> dict[str, Any]:
    """Three facts about a fitted tree with single linkage, all of squared distances.

    Returns:
        spread: `d_0`, the mean squared distance within a class.
        nearest: quantiles over the classes of the distance to the nearest other class, over `d_0`.
        levels: the share of classes that meet their nearest at each level, 0 .. L.
    """
    labels = tree.part("labels")  # of the classes that have had samples
    nearest = tree.neighbors(labels, 1).squeeze(1)
    spread = tree.part("average_spread")
    distances = tree.cophenetic_distances(labels, nearest) / spread
    levels = torch.bincount(tree.merge_levels(labels, nearest), minlength=tree.num_levels + 1) / len(labels)
    return {
        "spread": round(spread.item(), 4),
        "nearest": _rounded(distances.quantile(torch.tensor(QUANTILES).to(distances))),
        "levels": _rounded(levels),
    }


class NearnessOfRefreshes:
    """That of the first and of the last refresh of a training, for checkpoints as well."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, tree: ClassTree) -> None:
        """After each refresh."""
        self.found["last"] = nearness(tree)
        self.found.setdefault("first", self.found["last"])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"found": self.found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.found = state["found"]


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
