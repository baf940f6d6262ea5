"""The pictures of a comparison."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from pml_htl import ClassTree
from pml_htl.plots import plot_tree

from ..data import Splits
from .results import title_of

DENDROGRAM_ANCHORS = 8
DENDROGRAM_NEIGHBORS = 5


def plot_curves(document: dict[str, Any], path: Path) -> None:
    """Validation MAP@R over iterations, a line per contender (mean of its seeds) in a band from worst to best seed."""
    points = pd.concat(
        pd.DataFrame({"title": title_of(curve), "iterations": curve["iterations"], "map_at_r": curve["map_at_r"]})
        for curve in document["curves"]
    )
    figure, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    curves = points.groupby(["title", "iterations"])["map_at_r"].agg(["mean", "min", "max"]).reset_index()
    final = curves.groupby("title")["mean"].last().sort_values(ascending=False)
    colors = plt.get_cmap("tab10" if len(final) <= 10 else "tab20")
    for place, title in enumerate(final.index):
        curve = curves[curves.title == title]
        own = title.startswith("htl")
        ax.plot(
            curve.iterations, curve["mean"], color=colors(place), label=title, marker="o", markersize=3.5,
            linewidth=2.2 if own else 1.4, linestyle="-" if own else "--",
        )  # fmt: skip
        ax.fill_between(curve.iterations, curve["min"], curve["max"], color=colors(place), alpha=0.15, linewidth=0)
    ax.set(xlabel="iterations", ylabel="MAP@R on the validation classes", xlim=(0, None))
    figure.legend(loc="outside right upper", frameon=False, title="best at the end first", alignment="left")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def plot_class_tree(tree: ClassTree, data: Splits, model: str, path: Path) -> None:
    """A legible part of a trained tree: some classes spread over it and their nearest, with their first images as leaves."""
    tree = copy.deepcopy(tree).cpu()
    spread = torch.linspace(0, len(tree.part("labels")) - 1, DENDROGRAM_ANCHORS).long()
    order = torch.from_numpy(np.argsort(tree.part("nodes")[:, 1].numpy(), kind="stable"))  # classes of a node side by side
    anchors = tree.part("labels")[order[spread]]
    labels = torch.cat([anchors, tree.neighbors(anchors, DENDROGRAM_NEIGHBORS).flatten()])

    def image(label: int) -> np.ndarray:
        pixels = data.train.pictures_of(label)[0].permute(1, 2, 0).numpy()
        return pixels[..., 0] if pixels.shape[-1] == 1 else pixels

    ax = plot_tree(tree, labels, image=image)
    ax.set_title(f"Where classes meet in the trained model of {model}", loc="left")
    figure = ax.figure
    assert isinstance(figure, Figure)  # `plot_tree` has made it
    figure.savefig(path, dpi=140)
    plt.close(figure)
