"""What might tell before the test how much anchor-neighbour sampling brings: the first tree, and validation on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

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
FORMATS = {**dict.fromkeys(FACTS, "{:.2f}"), **dict.fromkeys(MOMENTS, "{:+.1f}")}


def first_nearness(document: dict[str, Any], title: str) -> dict[str, float]:
    """The facts after the first refresh: means over the trainings with this title that have them; empty without any."""
    trees = [curve["nearness"]["first"] for curve in document["curves"] if "nearness" in curve and title_of(curve) == title]
    return {name: float(np.mean([fact(tree) for tree in trees])) for name, fact in FACTS.items()} if trees else {}


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


def signs_and_gains(documents: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for each loss of each file, the largest gain first: what, method, `SIGNS`, gain in points, and it as `shown`.

    Losses whose trainings have no facts of their first tree are left out.
    """
    found = []
    for document in documents:
        for alone, sampled in pairs(document).items():
            facts, gain = first_nearness(document, sampled), gains(document)[alone]
            if facts:
                moments = {head: validation_gain(document, alone, sampled, share) for head, share in MOMENTS.items()}
                row = {"what": what_of(document), "method": sampled, **facts, **moments}
                found.append({**row, "gain": 100 * gain.mean, "shown": with_interval(gain, sign="+")})
    if not found:
        raise ValueError("the view nearness needs trainings with our sampler that keep facts of their first tree")
    return pd.DataFrame(found).sort_values("gain", ascending=False, kind="stable", ignore_index=True)


def orders(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Spearman's correlation of each sign with the gain: of each method with three rows or more, and of "all" methods."""
    groups = {str(method): rows for method, rows in table.groupby("method", sort=False)}
    if len(groups) > 1:
        groups["all"] = table
    return {name: rows[[*SIGNS]].corrwith(rows["gain"], method="spearman") for name, rows in groups.items() if len(rows) > 2}


def nearness_table(documents: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Heads, cells and caption: `signs_and_gains`, and the rank correlations below.

    Raises:
        ValueError: no training has facts of its first tree.
    """
    table = signs_and_gains(documents)
    rows: list[tuple[str, ...]] = [
        (row["what"], row["method"], *(FORMATS[head].format(row[head]) for head in SIGNS), row["shown"])
        for row in table.to_dict("records")
    ]
    for name, found in orders(table).items():
        rows.append(("**rank correlation with the gain**", name, *(f"{found[head]:+.2f}" for head in SIGNS), "-"))
    return (
        ("training set", "method", *SIGNS, "gain"),
        rows,
        "of the tree after the first refresh: the squared distance of a class to its nearest over the average spread, and "
        "the share of classes that meet their nearest at the lowest levels; val.: MAP@R on the validation classes with "
        "anchor-neighbour sampling less that with MPerClassSampler, at a quarter, a half and the end of the training, in "
        "points of per cent; gain: the same on the test classes, paired by seed, ± half the width of its 95% interval",
    )
