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


def with_both(*methods: str) -> dict[str, Any]:
    """Contenders with either sampler, those with ours compared with those with PML's."""
    both = {method: [f"{method}:sampling={sampling}" for sampling in SAMPLINGS] for method in methods}
    return {
        "contenders": [contender for contenders in both.values() for contender in contenders],
        "compared_with": {neighbors: per_class for per_class, neighbors in both.values()},
    }


SAMPLINGS = ("per-class", "neighbors")
OTHERS = ["triplet", "triplet-semihard", "contrastive", "multi-similarity", "ntxent", "proxy-anchor"]
# A loss of each kind: triplets, pairs, the smooth form without the tree's margin, and proxies.
KINDS = ["triplet", "multi-similarity", "htl-constant", "normalized-softmax"]
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
    "sampling": Ablation("anchor-neighbour sampling for the other losses", **with_both(*OTHERS)),
    "length": Ablation(
        "anchor-neighbour sampling over the length of a training",
        **with_both(*KINDS),
        plans=[{"iterations": 500}, {"iterations": 1000}, {}, {"iterations": 4000}],
    ),
    "classes": Ablation(
        "anchor-neighbour sampling over the number of training classes",
        **with_both("triplet", "htl-constant"),
        plans=[{"classes": 300}, {"classes": 1000}, {"classes": 3000}],
    ),
    "samples": Ablation(
        "anchor-neighbour sampling over the samples of a class",
        **with_both("triplet", "htl-constant"),
        plans=[{"samples_per_class": 5}, {"samples_per_class": 14}, {"samples_per_class": 30}],
    ),
    "noise": Ablation(
        "label noise: a tenth of the classes split in two, or a twentieth of the labels wrong; neighbors-apart leaves out "
        "neighbours that meet at level 0, neighbors-distinct those as near as halves of a class",
        [f"htl-constant:sampling={sampling}" for sampling in (*SAMPLINGS, "neighbors-apart", "neighbors-distinct")],
        [{}, {"split_classes": 0.1}, {"wrong_labels": 0.05}],
        {
            "htl-constant:sampling=neighbors": "htl-constant:sampling=per-class",
            "htl-constant:sampling=neighbors-apart": "htl-constant:sampling=neighbors",
            "htl-constant:sampling=neighbors-distinct": "htl-constant:sampling=neighbors",
        },
    ),
    "anchors": Ablation(
        "neighbours by their ratio to the spreads instead of their distance (neighbors-ratio), and anchors rather where "
        "classes are not told apart (neighbors-hard)",
        [f"htl-constant:sampling={sampling}" for sampling in ("neighbors", "neighbors-ratio", "neighbors-hard")],
        compared_with={
            f"htl-constant:sampling={sampling}": "htl-constant" for sampling in ("neighbors-ratio", "neighbors-hard")
        },
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
