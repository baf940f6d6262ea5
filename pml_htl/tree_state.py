"""What a saved class tree consists of, and the checks that a file must pass before a tree takes it over."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .labels import name_some
from .linkage import cut_levels

FORMAT_VERSION = 1
DIMENSIONS = {
    "labels": 1,
    "thresholds": 1,
    "spreads": 1,
    "average_spread": 0,
    "nodes": 2,
    "merge_edges": 2,
    "merge_heights": 1,
    "nearest_classes": 2,
}
NAMES = tuple(DIMENSIONS)


def problem_with(version: Any, saved: dict[str, Any], num_levels: int, labels: torch.Tensor | None) -> str | None:
    """What keeps a saved state from being a tree of `num_levels` with these labels (None: any), or None.

    Args:
        version: the format version in the file.
        saved: its other entries by their names; none for a tree that was not fitted.
    """
    for name, value in (("format_version", version), *saved.items()):
        if not isinstance(value, torch.Tensor) or value.ndim != DIMENSIONS.get(name, 0):
            return f"{name} is not a tensor of {DIMENSIONS.get(name, 0)} dimensions"
        if value.layout != torch.strided or value.is_meta:
            return f"{name} is not a dense tensor with values"
    if version != FORMAT_VERSION:
        return f"its format version is {version.item()}, this version of pml-htl reads {FORMAT_VERSION}"
    if not saved:
        return None
    num_classes, saved_levels = len(saved["labels"]), len(saved["thresholds"]) - 1
    if saved_levels != num_levels:
        return f"it was saved with num_levels={saved_levels}, but this tree has num_levels={num_levels}"
    if labels is not None and not torch.equal(saved["labels"].to(labels.device), labels):
        known, others = set(labels.tolist()), set(saved["labels"].tolist())
        differing = name_some(torch.tensor(sorted(known ^ others), dtype=torch.int64))
        return f"its {num_classes} classes are not the {len(labels)} classes of this tree: only one of them has {differing}"
    if num_classes < 2:
        return f"a tree has at least two classes, but it has {num_classes}"
    num_neighbors = saved["nearest_classes"].shape[-1]
    shapes = {
        "labels": (num_classes,),
        "thresholds": (num_levels + 1,),
        "spreads": (num_classes,),
        "average_spread": (),
        "nodes": (num_classes, num_levels + 1),
        "merge_edges": (num_classes - 1, 2),
        "merge_heights": (num_classes - 1,),
        "nearest_classes": (num_classes, num_neighbors),
    }
    positions_of_classes = ("nodes", "merge_edges", "nearest_classes")
    for name, shape in shapes.items():
        value = saved[name]
        dtype = torch.int64 if name in (*positions_of_classes, "labels") else torch.float64
        if tuple(value.shape) != shape or value.dtype != dtype:
            return f"{name} should be {dtype} of shape {shape}, but is {value.dtype} of shape {tuple(value.shape)}"
        if name in positions_of_classes and not ((value >= 0) & (value < num_classes)).all():
            return f"{name} points outside its {num_classes} classes"
        if not torch.isfinite(value).all():
            return f"{name} is not finite"
        if name != "labels" and (value < 0).any():
            return f"{name} is negative"
    if (saved["labels"].diff() <= 0).any():
        return "its labels are not sorted"
    for name in ("merge_heights", "thresholds"):
        if (saved[name].diff() < 0).any():
            return f"its {name} do not ascend"
    neighbors = saved["nearest_classes"]
    own = torch.arange(num_classes, device=neighbors.device).unsqueeze(1)
    if num_neighbors == 0 or (torch.cat([neighbors, own], dim=1).sort(dim=1).values.diff(dim=1) == 0).any():
        return "its nearest_classes are not different other classes of each"
    edges, heights, thresholds = (saved[name].cpu().numpy() for name in ("merge_edges", "merge_heights", "thresholds"))
    if not np.array_equal(cut_levels(edges, heights, thresholds), saved["nodes"].cpu().numpy()):
        return "its nodes are not those of its merges and thresholds"
    if saved["nodes"][:, -1].any():
        return "its merges do not join all classes"
    return None
