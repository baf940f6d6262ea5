"""The pictures of a comparison."""

from __future__ import annotations

import base64
import copy
import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from pml_htl import ClassTree
from pml_htl.plots import plot_tree

from ..data import Splits
from .curves import AXES, mean_curves
from .results import readable
from .sampling import training_set

DENDROGRAM_ANCHORS = 8
DENDROGRAM_NEIGHBORS = 5


def plot_curves(document: dict[str, Any], path: Path, over: str = "iterations") -> None:
    """Validation MAP@R over "iterations" or "seconds": a line per contender, its seeds' mean, in a band from worst to best.

    Raises:
        ValueError: `over` is something else, or no curve has seconds, which earlier versions did not keep.
    """
    curves = mean_curves(document, over)
    if curves.empty:
        raise ValueError(f"no training in this file has {over}: an earlier version made them")
    figure, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    final = curves.groupby("title")["mean"].last().sort_values(ascending=False)
    colors = plt.get_cmap("tab10" if len(final) <= 10 else "tab20")
    for place, title in enumerate(final.index):
        curve = curves[curves.title == title]
        own = title.startswith("htl")
        ax.plot(
            curve["at"], curve["mean"], color=colors(place), label=readable(title), marker="o", markersize=3.5,
            linewidth=2.2 if own else 1.4, linestyle="-" if own else "--",
        )  # fmt: skip
        ax.fill_between(curve["at"], curve["low"], curve["high"], color=colors(place), alpha=0.15, linewidth=0)
    ax.set(xlabel=AXES[over], ylabel="MAP@R on the validation classes", xlim=(0, None))
    ax.set_title(f"Trained on {training_set(document)}", loc="left")
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


def plot_retrievals(document: dict[str, Any], path: Path, queries: int) -> None:
    """The images nearest to some queries, a row for each method; frames of two colours and marks tell right from wrong.

    Half of the queries are of the worst, half of those at random; `document` is that of `report/retrievals.py`.
    """
    by_kind = [[query for query in document["queries"] if query["kind"] == kind] for kind in ("worst", "random")]
    chosen = [query for found in by_kind for query in found[: queries // 2]]
    methods = document["methods"]
    count = max(len(found) for query in chosen for found in query["neighbors"].values())
    rows = -(-len(chosen) // 2)
    size = 12, rows * (0.41 * len(methods) + 0.45)  # inches; two queries side by side, fifteen pictures wide each
    figure, axes = plt.subplots(rows, 2, figsize=size, layout="constrained", squeeze=False, facecolor="white")
    for ax, query in zip(axes.flat, chosen, strict=False):
        ax.set(xlim=(-4.9, count), ylim=(len(methods) - 0.45, -0.55), aspect="equal")
        ax.axis("off")
        kind = "one of the worst queries" if query["kind"] == "worst" else "a query at random"
        ax.set_title(kind, loc="left", fontsize=10, color="#444444")
        draw_picture(ax, document, query["picture"], -4.4, (len(methods) - 1) / 2, 0.9, "#444444", "-")
        for row, method in enumerate(methods):
            ax.text(-0.7, row, method, ha="right", va="center", fontsize=9)
            for place, (picture, is_right) in enumerate(query["neighbors"][method]):
                color, line = ("#0072B2", "-") if is_right else ("#D55E00", ":")
                draw_picture(ax, document, picture, place, row, 0.8, color, line)
                if not is_right:
                    ax.plot([place - 0.4, place + 0.4], [row + 0.4, row - 0.4], color=color, linewidth=1.2)
    for ax in list(axes.flat)[len(chosen) :]:
        ax.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_picture(
    ax: Axes, document: dict[str, Any], place: int, x: float, y: float, size: float, color: str, line: str
) -> None:
    """A picture of the document around a point, in a frame."""
    uri = document["pictures"][place][0]
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    half = size / 2
    ax.imshow(pixels, extent=(x - half, x + half, y + half, y - half))
    ax.add_patch(Rectangle((x - half, y - half), size, size, fill=False, edgecolor=color, linestyle=line, linewidth=2))
