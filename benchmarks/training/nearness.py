"""How near the classes of a tree are to each other: what might tell beforehand whether sampling near ones pays."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from pml_htl import ClassTree

LISTED_PAIRS = 10
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


def twin_ranks(tree: ClassTree, twins: Collection[tuple[int, int]]) -> list[int]:
    """Where twins, classes that are one by mistake, stand among the most confusable pairs: 1, 2, ..., ascending.

    Of so many pairs for each twin (`LISTED_PAIRS`); twins that are not among them are left out.
    """
    table = tree.confusable(LISTED_PAIRS * len(twins))
    pairs = zip(table["label_a"].tolist(), table["label_b"].tolist(), strict=True)
    return [rank for rank, pair in enumerate(pairs, start=1) if pair in twins]


class NearnessOfRefreshes:
    """Nearness at the first and the last refresh of a training, and ranks of twins at each; for checkpoints as well."""

    def __init__(self, twins: Collection[tuple[int, int]]) -> None:
        self.twins = frozenset(twins)
        self.found: dict[str, Any] = {}

    def add(self, tree: ClassTree, iterations: int) -> None:
        """After each refresh, with the iterations until then."""
        self.found["last"] = nearness(tree)
        self.found.setdefault("first", self.found["last"])
        if self.twins:
            self.found.setdefault("twins", []).append([iterations, twin_ranks(tree, self.twins)])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"found": self.found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.found = state["found"]


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
