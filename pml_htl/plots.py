"""Pictures of a class tree. Needs matplotlib: `pip install matplotlib`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.cluster.hierarchy as hierarchy
import torch

from .common.labels import Labels, label_tensor, positions
from .tree import ClassTree
from .tree.linkage import restrict_linkage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LEGIBLE = 80
NUM_IN_TENSORBOARD = 60
SPRITE = 48  # pixels of an image in TensorBoard's projector, which takes 8,192 x 8,192 of all together


def plot_tree(
    tree: ClassTree,
    labels: Labels | None = None,
    *,
    name: Callable[[int], str] = str,
    image: Callable[[int], np.ndarray] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws classes of a fitted tree as a dendrogram over squared distances, with its merging thresholds.

    Args:
        tree: a fitted tree.
        labels: (K,) which classes; they meet at the heights at which they do among all classes. Default all, if they are
            at most 80.
        name: what to write under a class, from its label.
        image: a grey (H, W) or colour (H, W, 3) picture to put there instead, from its label.
        ax: where to draw; default a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a tree that is not fitted, labels that it does not know, fewer than two, or too many to be read.
    """
    require_matplotlib()
    import matplotlib.pyplot as plt
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    merges = tree.to_scipy_linkage()
    known = tree.part("labels").cpu()
    leaves = positions(known if labels is None else label_tensor(labels, "cpu").unique(), known, "the class tree").numpy()
    if not 2 <= len(leaves) <= MAX_LEGIBLE:
        raise ValueError(f"a legible tree has 2 to {MAX_LEGIBLE} classes, not {len(leaves)}; choose some by labels=")
    if ax is None:
        ax = plt.subplots(figsize=(max(6.0, 0.28 * len(leaves)), 4.5), layout="constrained")[1]

    merges = restrict_linkage(merges, leaves)
    drawn: Mapping[str, Any] = hierarchy.dendrogram(merges, no_labels=True, ax=ax, link_color_func=lambda _: "#33516e")
    low, high = merges[0, 2], merges[-1, 2]
    padding = 0.08 * max(high - low, 1e-6)
    ax.set_ylim(max(0.0, low - 4 * padding), high + padding)
    _draw_thresholds(ax, tree.part("thresholds").cpu().numpy())
    for place, leaf in enumerate(drawn["leaves"]):
        label = int(known[leaves[leaf]])
        x = 10 * place + 5  # where scipy puts the leaves
        if image is None:
            text, below = name(label), ("data", "axes fraction")
            rotation = 0 if len(text) <= 2 else 90  # as wide as a leaf, or upright
            ax.annotate(text, (x, 0), (0, -4), below, "offset points", ha="center", va="top", rotation=rotation)
        else:
            picture = OffsetImage(image(label), cmap="gray_r", zoom=0.5)
            # The axes are as wide as all leaves together, so a picture of half its size fits under its leaf.
            box = AnnotationBbox(picture, (x, 0), (0, -11), ("data", "axes fraction"), "offset points", frameon=False)
            ax.add_artist(box)
    ax.set_ylabel("squared distance")
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    return ax


def add_to_tensorboard(tree: ClassTree, writer: Any, step: int) -> None:
    """Adds a picture of the tree to a TensorBoard `SummaryWriter`, as "class_tree", and `confusable` pairs as text.

    A large tree is drawn by 60 classes at even steps through its labels, always the same ones.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    labels = tree.part("labels").cpu()
    num_drawn = min(len(labels), NUM_IN_TENSORBOARD)
    figure = Figure(figsize=(max(6.0, 0.28 * num_drawn), 4.5), layout="constrained")
    drawn = labels[torch.linspace(0, len(labels) - 1, num_drawn).round().long()]
    ax = plot_tree(tree, drawn, ax=figure.subplots())
    shown = f"{num_drawn} of {len(labels)}" if num_drawn < len(labels) else f"all {num_drawn}"
    ax.set_title(f"{shown} classes, average spread {tree.d_0:.3f}, step {step}")
    writer.add_figure("class_tree", figure, step)
    writer.add_text("confusable_classes", confusable_as_markdown(tree), step)


def confusable_as_markdown(tree: ClassTree, k: int = 20) -> str:
    """The table of `ClassTree.confusable`."""
    rows = tree.confusable(k)
    lines = ["| class | and | ratio | distance | level |", "| ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['label_a']} | {row['label_b']} | {row['ratio']:.3f} | {row['distance']:.4f} | {row['level']} |"
        )
    return "\n".join(lines)


def add_sample_to_tensorboard(
    embeddings: torch.Tensor, labels: torch.Tensor, inputs: list[Any], writer: Any, step: int
) -> None:
    """Adds embeddings to the projector of a TensorBoard `SummaryWriter`, as "sample".

    Args:
        embeddings: (N, D). labels: (N,).
        inputs: of each batch; if they are images (B, 1 or 3, height, width) these are the points.
    """
    images = None
    if all(isinstance(batch, torch.Tensor) and batch.ndim == 4 and batch.shape[1] in (1, 3) for batch in inputs):
        images = torch.cat([batch.detach().cpu().float() for batch in inputs])
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        images = torch.nn.functional.interpolate((images - low) / (high - low).clamp(min=1e-12), size=(SPRITE, SPRITE))
    writer.add_embedding(embeddings, metadata=labels.tolist(), label_img=images, global_step=step, tag="sample")


def require_matplotlib() -> None:
    """Raises an `ImportError` that says how to install matplotlib, unless it is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a picture of a tree needs matplotlib: pip install matplotlib") from error


def _draw_thresholds(ax: Axes, thresholds: np.ndarray) -> None:
    """A line for every level within the picture, and the level's number at its right end."""
    low, high = ax.get_ylim()
    for level, threshold in enumerate(thresholds):
        if low <= threshold <= high:
            ax.axhline(threshold, color="#c0504d", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            ax.annotate(
                f" $d_{{{level}}}$", (1, threshold), xycoords=("axes fraction", "data"), color="#c0504d", va="center"
            )
