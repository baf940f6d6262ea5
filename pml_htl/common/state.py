"""What must be true of a saved state before a part takes it over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .labels import name_some


def check_entries(state: Any, names: Iterable[str], owner: str) -> None:
    """Raises a `ValueError` unless `state` is a dictionary with these names and no others."""
    wanted = sorted(names)
    if not isinstance(state, dict) or sorted(map(str, state)) != wanted:
        found = ", ".join(sorted(map(str, state))) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"the state of a {owner} has {', '.join(wanted)}, but this has {found}")


def check_setting(name: str, saved: Any, own: Any, owner: str) -> None:
    """Raises a `ValueError` unless the state was saved with the setting that this part has."""
    if type(saved) is not type(own) or saved != own:
        raise ValueError(f"the state is of a {owner} with {name}={saved!r}, but this one has {name}={own!r}")


def check_labels(saved: Any, own: torch.Tensor, owner: str) -> None:
    """Raises a `ValueError` unless the state was saved with these sorted labels (C,) int64."""
    if not isinstance(saved, torch.Tensor) or saved.dtype != own.dtype or saved.ndim != 1:
        raise ValueError(f"labels of the state of a {owner} should be (C,) int64, but they are {saved!r}")
    labels, counts = torch.cat([saved.to(own.device), own]).unique(return_counts=True)
    if (counts != 2).any() or len(saved) != len(own):
        raise ValueError(
            f"the state is of a {owner} with {len(saved)} classes, but this one has {len(own)}, and only one of them has "
            f"{name_some(labels[counts != 2])}"
        )
