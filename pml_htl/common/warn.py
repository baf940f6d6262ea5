"""Warnings for what trains in vain, each given once."""

from __future__ import annotations

import warnings

import torch

from .transforms import is_batched, lasting

PATIENCE = 100
COLLAPSED_SPREAD = 1e-4


class IdleWatch:
    """Warns when no triplet has been active for 100 batches in a row.

    It counts on the device, and reads the count where that is free, on the CPU, or when it is told that now is the time.
    """

    def __init__(self) -> None:
        self._num_batches = 0
        self._num_idle: torch.Tensor | int = 0  # of the latest batches
        self._has_warned = False

    def note(self, num_active: torch.Tensor, look: bool) -> None:
        """Takes note of a batch with so many active triplets (a scalar)."""
        if self._has_warned:
            return
        num_idle = torch.where(num_active > 0, 0, self._num_idle + 1)
        if is_batched(num_idle):  # a number for each of several models
            return
        self._num_batches += 1
        self._num_idle = lasting(num_idle)
        may_look = look or num_active.device.type == "cpu"
        if self._num_batches >= PATIENCE and may_look and int(self._num_idle) >= PATIENCE:
            self._has_warned = True
            warnings.warn(
                f"no triplet has given a loss in the last {int(self._num_idle)} batches, so there was nothing to learn from "
                "them: the training is done, beta (initial_margin before the first refresh) is too small, or the batches "
                "have a single sample of each class",
                stacklevel=2,
            )


def warn_of_collapse(average_spread: float) -> bool:
    """Warns, and says so, if the samples of each class have all but become one point."""
    if average_spread >= COLLAPSED_SPREAD:
        return False
    warnings.warn(
        f"the embeddings have collapsed: the average squared distance within a class is {average_spread:.2g} (at most 4). "
        "Lower the learning rate, train longer with the constant margin (warmup_epochs), or stop earlier",
        stacklevel=3,  # past `fit`
    )
    return True
