"""What might tell before the test how much anchor-neighbour sampling brings: the first tree, and validation on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from .intervals import with_interval
from .results import title_of
from .sampling import gains, pairs, what_of

# Facts of the tree at the first refresh that might tell; see training/nearness.py.
FACTS = {
    "nearest class (median)": lambda nearness: nearness["nearest"][2],
    "nearest class (10%)": lambda nearness: nearness["nearest"][0],
    "met at level 0": lambda nearness: nearness["levels"][0],
    "met at level 0 or 1": lambda nearness: sum(nearness["levels"][:2]),
}
MOMENTS = {"val. at a quarter": 0.25, "val. at a half": 0.5, "val. at the end": 1.0}  # of a training
SIGNS = (*FACTS, *MOMENTS)  # of the gain, before the test


def first_nearness(document: dict[str, Any], title: str) -> dict[str, float]:
    """The facts after the first refresh: means over the trainings with this title that have them; empty without any."""
    curves = [curve for curve in document["curves"] if "nearness" in curve and title_of(curve) == title]
    means = {name: np.mean([fact(curve["nearness"]["first"]) for curve in curves]) for name, fact in FACTS.items() if curves}
    return {name: float(mean) for name, mean in means.items()}


def validation_gain(document: dict[str, Any], alone: str, sampled: str, share: float) -> float:
    """MAP@R on the validation classes with our sampler less that with PML's, after this share of the training.

    Mean over the seeds that both have, in points of per cent.
    """
    moment = share * document["metadata"]["plan"]["iterations"]
    found: dict[str, dict[int, float]] = {alone: {}, sampled: {}}
    for curve in document["curves"]:
        if title_of(curve) in found:
            nearest = min(range(len(curve["iterations"])), key=lambda point: abs(curve["iterations"][point] - moment))
            found[title_of(curve)][curve["seed"]] = curve["map_at_r"][nearest]
    both = found[alone].keys() & found[sampled].keys()
    return 100 * float(np.mean([found[sampled][seed] - found[alone][seed] for seed in both]))


def nearness_table(documents: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, cells and caption: a row for each loss of each file, with what might tell its gain before the test.

    Raises:
        ValueError: no training has facts of its first tree.
    """
    found = []
    for document in documents:
        for alone, sampled in pairs(document).items():
            signs = {name: (value, f"{value:.2f}") for name, value in first_nearness(document, sampled).items()}
            if not signs:
                continue
            for head, share in MOMENTS.items():
                value = validation_gain(document, alone, sampled, share)
                signs[head] = (value, f"{value:+.1f}")
            found.append((what_of(document), sampled, signs, gains(document)[alone]))
    if not found:
        raise ValueError(
            "the view nearness needs trainings with our sampler that keep facts of their first tree, and has none"
        )
    found.sort(key=lambda row: -row[3].mean)
    rows = [
        (what, method, *(shown for _, shown in signs.values()), with_interval(gain, sign="+"))
        for what, method, signs, gain in found
    ]
    methods = dict.fromkeys(method for _, method, _, _ in found)
    groups = {method: [row for row in found if row[1] == method] for method in methods}
    for name, group in (groups if len(groups) == 1 else {**groups, "all": found}).items():
        if len(group) > 2:
            own = [gain.mean for *_, gain in group]
            orders = [stats.spearmanr([signs[head][0] for _, _, signs, _ in group], own).statistic for head in SIGNS]
            rows.append(("**rank correlation with the gain**", name, *(f"{order:+.2f}" for order in orders), "-"))
    return (
        ("training set", "method", *SIGNS, "gain"),
        rows,
        "of the tree after the first refresh: the squared distance of a class to its nearest over the average spread, and "
        "the share of classes that meet their nearest at the lowest levels; val. at a half: MAP@R on the validation classes "
        "after half of the training with anchor-neighbour sampling less that with MPerClassSampler, in points of per cent; "
        "gain: the same at the end on the test classes, paired over the seeds, ± half the width of its 95% interval",
    )
