"""Class labels: any integers of the data set, and their positions in a sorted list of classes.

Everything public speaks in labels (-7, 3, 10**12); everything stored is indexed by position (0 .. C - 1).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from .transforms import all_copies, outside_transforms

Labels: TypeAlias = torch.Tensor | np.ndarray | Sequence[int] | int

SAME_LABELS = "give both the same labels, before or after any mapping of labels"
_MAX_NAMED = 5


def label_tensor(labels: Labels, device: torch.device | str | None = None) -> torch.Tensor:
    """`labels` as an int64 tensor of the same shape; a `TypeError` if they are not integers."""
    if not isinstance(labels, torch.Tensor):
        try:
            array = np.asarray(labels)
        except ValueError:
            raise ValueError("labels must be integers in an array, but these are rows of several lengths") from None
        if array.size == 0:
            array = array.astype(np.int64)
        if array.dtype.kind not in "iu":
            raise TypeError(f"labels must be integers, but these are of type {array.dtype}; map them to integers first")
        if array.dtype.kind == "u":
            if array.size and array.max() > np.iinfo(np.int64).max:
                raise ValueError(f"labels must fit into int64, but the largest is {array.max()}")
            array = array.astype(np.int64)
        labels = torch.as_tensor(array)
    elif labels.numel() == 0:
        labels = labels.to(torch.int64)
    elif labels.dtype == torch.uint64:
        with outside_transforms():
            return label_tensor(labels.cpu().numpy(), labels.device if device is None else device)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, but these are of type {labels.dtype}; map them to integers first")
    return labels.detach().to(device=device, dtype=torch.int64)


def find(labels: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of each label in the sorted `classes` (C,), and whether it is there at all; any shape, O(log C) each."""
    found = torch.searchsorted(classes, labels.contiguous()).clamp(max=len(classes) - 1)
    return found, classes[found] == labels


def positions(labels: torch.Tensor, classes: torch.Tensor, owner: str, advice: str = SAME_LABELS) -> torch.Tensor:
    """The position of each label in the sorted `classes` (C,); any shape, O(log C) each.

    Raises a `ValueError` that names labels which are not among the classes; `owner` says whose classes they are, `advice`
    what to do. Labels on an accelerator are not waited for: there an unknown one is a device-side assertion, which comes
    later and names none.
    """
    found, known = find(labels, classes)
    known = all_copies(known)
    if labels.device.type not in ("cpu", "mps"):  # MPS has no such assertion
        torch._assert_async(known.all(), f"a label is not among the {len(classes)} classes of {owner}")
    elif not known.all():
        given = all_copies(labels)
        raise ValueError(
            f"{name_some(given[~torch.isin(given, classes)])} not among the {len(classes)} classes of {owner} "
            f"(smallest {classes[0].item()}, largest {classes[-1].item()}); {advice}"
        )
    return found


def name_some(labels: torch.Tensor) -> str:
    """Names the distinct labels, a few of them: "label 7" or "labels 3, 7, 9, ... (12 in all)"."""
    distinct = labels.unique().tolist()
    named = ", ".join(map(str, distinct[:_MAX_NAMED]))
    more = f", ... ({len(distinct)} in all)" if len(distinct) > _MAX_NAMED else ""
    return f"label{'s' if len(distinct) > 1 else ''} {named}{more}"


def integer_at_least(minimum: int, name: str, value: Any) -> int:
    """`value` as an int, or an error that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, but it is {value!r}") from None
    if isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, but it is {value!r}")
    return number
