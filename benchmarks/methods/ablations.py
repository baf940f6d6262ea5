"""The questions that `ablate` answers, each a handful of contenders that differ in one thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .contenders import BASELINE


@dataclass(frozen=True)
class Ablation:
    """Contenders, as on the command line, and the plans to train them with: the usual one with some changes.

    A contender is compared with `htl` at its defaults, but for those that have another one in `compared_with`.
    """

    question: str
    contenders: list[str]
    plans: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    compared_with: dict[str, str] = field(default_factory=dict)

    def baseline_of(self, contender: str) -> str:
        """The contender that it is compared with, as on the command line."""
        return self.compared_with.get(contender, BASELINE)


def varied(method: str, setting: str, *values: float | str) -> list[str]:
    return [f"{method}:{setting}={value}" for value in values]


OTHERS = ["triplet", "triplet-semihard", "contrastive", "multi-similarity", "ntxent", "proxy-anchor"]
SAMPLINGS = ("per-class", "neighbors")
ABLATIONS: dict[str, Ablation] = {
    "two-by-two": Ablation(
        "sampling and margin, each alone and together; constant margins at four values",
        [
            *(f"htl:sampling={s},margins=constant,beta={beta}" for s in SAMPLINGS for beta in (0.1, 0.2, 0.4, 0.8)),
            *(f"htl:sampling={s}" for s in SAMPLINGS),
        ],
    ),
    "two-by-two-paper": Ablation(
        "the same in the form of the paper",
        [
            *(f"htl-paper:sampling={s},margins=constant,beta={beta}" for s in SAMPLINGS for beta in (0.1, 0.2, 0.4)),
            *(f"htl-paper:sampling={s}" for s in SAMPLINGS),
        ],
    ),
    "sampling": Ablation(
        "anchor-neighbour sampling for the other losses",
        [f"{method}:sampling={sampling}" for method in OTHERS for sampling in SAMPLINGS],
        compared_with={f"{method}:sampling={SAMPLINGS[1]}": f"{method}:sampling={SAMPLINGS[0]}" for method in OTHERS},
    ),
    "margin": Ablation(
        "forms of the dynamic margin on the same batches",
        [
            "htl-paper",
            "htl-paper:distance=plain",
            "htl-paper:temperature=0.05",
            "htl",
            "htl-constant",
        ],
    ),
    "temperature": Ablation("smoothness; 0 is max(0, .)", varied("htl", "temperature", 0.0, 0.02, 0.05, 0.1, 0.2)),
    "levels": Ablation("the depth L of the tree", varied("htl", "num_levels", 4, 8, 16, 32, 64)),
    "beta": Ablation("the constant part of the margin", varied("htl", "beta", 0.0, 0.05, 0.1, 0.2, 0.4)),
    "neighborhood": Ablation("how many classes a neighbourhood has", varied("htl", "neighborhood_size", 1, 2, 4, 8, 16)),
    "linkage": Ablation("how groups of classes merge", varied("htl", "linkage", "single", "average", "complete")),
    "refresh": Ablation("epochs from one refresh of the tree to the next", varied("htl", "refresh_every", 1, 2, 3, 6)),
    "streaming": Ablation(
        "a tree of the classes seen so far, against waiting for all (80 iterations) and against a pass over the set",
        ["htl", "htl-streaming", "htl-streaming:warmup_epochs=4", "triplet-sampling", "triplet"],
        [{"samples_per_class": 5, "epoch_iterations": 20}],
    ),
    "batch-size": Ablation("samples in a batch", ["htl", "triplet"], [{"batch_size": 64}, {}, {"batch_size": 256}]),
}
