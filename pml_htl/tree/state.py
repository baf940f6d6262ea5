"""What the state of a class tree consists of, and the checks that a file must pass before a tree takes it over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from ..common.labels import name_some
from .given import apply_heights
from .linkage import cut_levels, merge_thresholds
from .merging import Merges

# Trees of a given hierarchy are version 2 and those with classes that wait version 3; all others are version 1. With the
# distances of the nearest classes it is 3 more. So earlier versions of this package refuse what they do not know.
FOUND_VERSION, GIVEN_VERSION, WAITING_VERSION = 1, 2, 3
WITH_DISTANCES = 3
VERSIONS = range(FOUND_VERSION, WAITING_VERSION + WITH_DISTANCES + 1)
DIMENSIONS = {
    "labels": 1,
    "thresholds": 1,
    "spreads": 1,
    "average_spread": 0,
    "nodes": 2,
    "merge_edges": 2,
    "merge_heights": 1,
    "nearest_classes": 2,
    "given_heights": 1,
    "taxonomy_height": 0,
    "waiting": 1,
    "nearest_distances": 2,
}
NAMES = tuple(DIMENSIONS)
GIVEN_NAMES = ("given_heights", "taxonomy_height")
OPTIONAL_NAMES = ("waiting", "nearest_distances")
FOUND_NAMES = tuple(name for name in NAMES if name not in (*GIVEN_NAMES, *OPTIONAL_NAMES))
# A given hierarchy has these before any fit, and by a matrix also the distances of the nearest classes.
SHAPE_NAMES = ("labels", "merge_edges", "nearest_classes", *GIVEN_NAMES)
SHORT = {"nearest_distances": torch.float32}
INTEGERS = ("labels", "nodes", "merge_edges", "nearest_classes", "taxonomy_height", "waiting")


def shape_of(labels: torch.Tensor, merges: Merges, taxonomy_height: int | None = None) -> dict[str, torch.Tensor]:
    """What stands before any spreads: labels and merges; those of a given hierarchy with its `taxonomy_height`."""
    shape = {
        "labels": labels,
        "merge_edges": torch.from_numpy(merges.edges),
        "nearest_classes": torch.from_numpy(merges.nearest),
    }
    if merges.nearest_distances is not None:  # as precise as the search of many classes is
        shape["nearest_distances"] = torch.from_numpy(merges.nearest_distances.astype(np.float32))
    heights = torch.from_numpy(merges.heights)
    if taxonomy_height is None:
        return {**shape, "merge_heights": heights}
    return {**shape, "given_heights": heights, "taxonomy_height": torch.tensor(taxonomy_height)}


def with_spreads(
    shape: dict[str, torch.Tensor], spreads: torch.Tensor, average_spread: torch.Tensor, num_levels: int
) -> dict[str, torch.Tensor]:
    """The state of a fitted tree: its shape (`shape_of`), and what follows from spreads (C,) and their average."""
    thresholds = merge_thresholds(average_spread.item(), num_levels)
    edges = shape["merge_edges"].cpu().numpy()
    heights = shape["given_heights" if "given_heights" in shape else "merge_heights"].cpu().numpy()
    merge_heights, nodes = apply_heights(edges, heights, int(shape.get("taxonomy_height", 0)), thresholds)
    return {
        **shape,
        "thresholds": torch.from_numpy(thresholds),
        "spreads": spreads,
        "average_spread": average_spread,
        "nodes": torch.from_numpy(nodes),
        "merge_heights": torch.from_numpy(merge_heights),
    }


def version_of(state: Collection[str]) -> int:
    """The format version of a state with these entries."""
    kind = WAITING_VERSION if "waiting" in state else FOUND_VERSION
    if _is_given(state):
        kind = GIVEN_VERSION
    return kind + WITH_DISTANCES * ("nearest_distances" in state)


def _is_given(state: Collection[str]) -> bool:
    return not set(GIVEN_NAMES).isdisjoint(state)


def read_entries(state_dict: dict[str, Any], prefix: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """The entries of a file that are a tree's, by their names, the names of those that lack, and of those that are none."""
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    saved = {name: own[name] for name in NAMES if name in own}
    needed: tuple[str, ...] = ()
    if _is_given(saved):
        needed = SHAPE_NAMES if {*saved} <= {*SHAPE_NAMES, *OPTIONAL_NAMES} else (*FOUND_NAMES, *GIVEN_NAMES)
    elif saved:  # an unfitted tree saves its version alone
        needed = FOUND_NAMES
    version = own.get("format_version")
    if isinstance(version, torch.Tensor) and version.numel() == 1 and not version.is_meta:
        needed = (*needed, *["nearest_distances"] * (version.item() in VERSIONS[WITH_DISTANCES:]))
    missing = [name for name in ("format_version", *needed) if name not in own]
    return saved, missing, [name for name in own if name not in (*NAMES, "format_version")]


def all_labels_of(state: Mapping[str, torch.Tensor | None]) -> torch.Tensor | None:
    """The labels of all classes (C + W,), sorted, also of those that wait; None if there are none yet."""
    labels, waiting = state.get("labels"), state.get("waiting")
    return labels if labels is None or waiting is None else torch.cat([labels, waiting]).sort().values


def problem_with(
    version: Any, saved: dict[str, Any], num_levels: int, labels: torch.Tensor | None, is_given: bool
) -> str | None:
    """What keeps a saved state from being a tree of `num_levels` with these labels, of all classes (None: any), or None.

    Args:
        version: the format version in the file.
        saved: its other entries by their names, none of them missing (`read_entries`).
        is_given: whether the tree that is to take it has a given hierarchy, which only another of that kind replaces.
    """
    for name, value in (("format_version", version), *saved.items()):
        if not isinstance(value, torch.Tensor) or value.ndim != DIMENSIONS.get(name, 0):
            return f"{name} is not a tensor of {DIMENSIONS.get(name, 0)} dimensions"
        if value.layout != torch.strided or value.is_meta:
            return f"{name} is not a dense tensor with values"
    if version not in VERSIONS:
        return f"its format version is {version.item()}, this version of pml-htl reads {VERSIONS[0]} to {VERSIONS[-1]}"
    if version != version_of(saved):
        return f"its format version is {version.item()}, but its entries are those of version {version_of(saved)}"
    if is_given and not _is_given(saved):
        return (
            "it was saved by a tree without a given hierarchy, which this tree has and keeps; load it into a new ClassTree"
        )
    if not saved:
        return None
    num_classes, is_fitted = len(saved["labels"]), "thresholds" in saved
    saved_levels = len(saved["thresholds"]) - 1 if is_fitted else num_levels
    if saved_levels != num_levels:
        return f"it was saved with num_levels={saved_levels}, but this tree has num_levels={num_levels}"
    for name in ("labels", "waiting"):
        if name in saved and saved[name].dtype != torch.int64:
            return f"{name} should be torch.int64, but is {saved[name].dtype}"
    all_labels = all_labels_of(saved)
    assert all_labels is not None
    if labels is not None and not torch.equal(all_labels.to(labels.device), labels):
        known, others = set(labels.tolist()), set(all_labels.tolist())
        differing = name_some(torch.tensor(sorted(known ^ others), dtype=torch.int64))
        return (
            f"its {len(all_labels)} classes are not the {len(labels)} classes of this tree: only one of them has {differing}"
        )
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
        "given_heights": (num_classes - 1,),
        "taxonomy_height": (),
        "waiting": (len(all_labels) - num_classes,),
        "nearest_distances": (num_classes, num_neighbors),
    }
    for name, value in saved.items():
        shape, dtype = shapes[name], torch.int64 if name in INTEGERS else SHORT.get(name, torch.float64)
        if tuple(value.shape) != shape or value.dtype != dtype:
            return f"{name} should be {dtype} of shape {shape}, but is {value.dtype} of shape {tuple(value.shape)}"
        if name in ("nodes", "merge_edges", "nearest_classes") and not ((value >= 0) & (value < num_classes)).all():
            return f"{name} points outside its {num_classes} classes"
        if not torch.isfinite(value).all():
            return f"{name} is not finite"
        if name not in ("labels", "waiting") and (value < 0).any():
            return f"{name} is negative"
    if (saved["labels"].diff() <= 0).any():
        return "its labels are not sorted"
    if "waiting" in saved and (len(saved["waiting"]) == 0 or (saved["waiting"].diff() <= 0).any()):
        return "its waiting labels are none, or not sorted"
    if (all_labels.diff() <= 0).any():
        return "its waiting labels are among its labels"
    neighbors = saved["nearest_classes"]
    own = torch.arange(num_classes, device=neighbors.device).unsqueeze(1)
    if num_neighbors == 0 or (torch.cat([neighbors, own], dim=1).sort(dim=1).values.diff(dim=1) == 0).any():
        return "its nearest_classes are not different other classes of each"
    if "nearest_distances" in saved and (saved["nearest_distances"].diff(dim=1) < 0).any():
        return "its nearest_distances do not ascend"
    state = {name: value.cpu().numpy() for name, value in saved.items()}
    problem = _problem_with_given(state) if _is_given(saved) else None
    return _problem_with_nodes(state) if problem is None and is_fitted else problem


def _problem_with_given(state: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the merges of a given hierarchy, or None."""
    heights, top = state["given_heights"], int(state["taxonomy_height"])
    if (np.diff(heights) < 0).any() or (heights < 0).any() or top < 0:
        return "its given_heights do not ascend from 0"
    if top > 0 and not (np.isin(heights, np.arange(1, top + 1))).all():
        return f"its given_heights are not among the {top} levels of its taxonomy"
    if cut_levels(state["merge_edges"], heights, np.zeros(2))[:, -1].any():
        return "its merge_edges do not join all classes"
    return None


def _problem_with_nodes(state: dict[str, np.ndarray]) -> str | None:
    """Why the nodes of a fitted tree, or the merge heights of a given one, are not what follows from the rest, or None."""
    edges, heights, thresholds = (state[name] for name in ("merge_edges", "merge_heights", "thresholds"))
    for name, values in (("merge_heights", heights), ("thresholds", thresholds)):
        if (np.diff(values) < 0).any():
            return f"its {name} do not ascend"
    if "given_heights" in state:
        heights, nodes = apply_heights(edges, state["given_heights"], int(state["taxonomy_height"]), thresholds)
        if not np.allclose(heights, state["merge_heights"], rtol=0, atol=1e-9):
            return "its merge_heights are not those of its given hierarchy and thresholds"
    else:
        nodes = cut_levels(edges, heights, thresholds)
    if not np.array_equal(nodes, state["nodes"]):
        return "its nodes are not those of its merges and thresholds"
    if nodes[:, -1].any():
        return "its merges do not join all classes"
    return None
