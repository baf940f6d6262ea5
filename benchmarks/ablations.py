"""The questions that `ablate` answers, each a handful of contenders that differ in one thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ablation:
    """Contenders, as on the command line, and the plans to train them with: the usual one with some changes."""

    question: str
    contenders: list[str]
    plans: list[dict[str, Any]] = field(default_factory=lambda: [{}])


def varied(method: str, setting: str, *values: float | str) -> list[str]:
    return [f"{method}:{setting}={value}" for value in values]


OTHERS = ["contrastive", "multi-similarity", "ntxent", "proxy-anchor", "triplet-semihard"]
ABLATIONS: dict[str, Ablation] = {
    "two-by-two": Ablation(
        "sampling and margin, each alone and together",
        ["triplet", "htl-sampling", "htl-margin", "htl"],
    ),
    "sampling": Ablation(
        "anchor-neighbour sampling for the other losses",
        [f"{method}:sampling={sampling}" for method in OTHERS for sampling in ("per-class", "neighbors")],
    ),
    "margin": Ablation(
        "forms of the dynamic margin, and constant ones, on the same batches",
        [
            *varied("htl-sampling", "margin", 0.05, 0.1, 0.2, 0.4),
            *(
                f"htl:distance={distance},continuous={continuous},tree_weight={weight}"
                for distance in ("squared", "plain")
                for continuous in ("no", "yes")
                for weight in (1.0, 0.5)
            ),
        ],
    ),
    "levels": Ablation("the depth L of the tree", [*varied("htl", "num_levels", 4, 8, 16, 32, 64), "htl:continuous=yes"]),
    "beta": Ablation("the constant part of the margin", varied("htl", "beta", 0.0, 0.05, 0.1, 0.2, 0.4)),
    "neighborhood": Ablation("how many classes a neighbourhood has", varied("htl", "neighborhood_size", 1, 2, 4, 8, 16)),
    "linkage": Ablation("how groups of classes merge", varied("htl", "linkage", "single", "average", "complete")),
    "refresh": Ablation("epochs from one refresh of the tree to the next", varied("htl", "refresh_every", 1, 2, 3, 6)),
    "batch-size": Ablation("samples in a batch", ["htl", "triplet"], [{"batch_size": size} for size in (64, 128, 256)]),
}
