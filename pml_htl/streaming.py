"""Class statistics of the batches that a loss sees anyway, for a refresh without a pass over the data set."""

from __future__ import annotations

from typing import Any

import torch

from .labels import label_tensor
from .statistics import ClassStatistics

BUFFERED_BATCHES = 16


class LossWatch:
    """Keeps class statistics of the embeddings that a loss is called with; a torch forward pre-hook.

    Only calls that train count: those with embeddings that require a gradient. Reference embeddings (of a memory) do not.
    The statistics follow a few batches behind (`up_to_date` catches up), so that a GPU is not waited for in each step.

    Args:
        loss: a module that is called with `(embeddings, labels, ...)`, (B, D) and (B,), both by position.
        labels: of the training set, as the loss sees them.
        forget: of `ClassStatistics`.
    """

    def __init__(self, loss: torch.nn.Module, labels: torch.Tensor, forget: float) -> None:
        self.labels = label_tensor(labels, "cpu").unique()
        self.forget = ClassStatistics(self.labels, 1, forget=forget).forget  # checked now, not in the first batch
        self.statistics: ClassStatistics | None = None  # until a batch tells the size of an embedding
        self._buffer: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Not `with_kwargs=True`: torch notes that in a dict of the loss, and record-keeper records such dicts, and fails.
        loss.register_forward_pre_hook(self)

    def __call__(self, loss: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Before a call of the loss; changes nothing in it."""
        if len(args) < 2 or not isinstance(args[1], torch.Tensor):
            raise ValueError(
                f"{type(loss).__name__} is watched for a streaming refresh, which sees positional arguments: call it as "
                "loss(embeddings, labels, ...), as PML's trainers do"
            )
        embeddings, labels = args[:2]
        if not embeddings.requires_grad:
            return
        self._buffer.append((embeddings.detach().clone(), labels.detach().clone()))
        if len(self._buffer) >= BUFFERED_BATCHES:
            self.up_to_date()

    def up_to_date(self) -> ClassStatistics | None:
        """The statistics of all batches so far; None if there were none.

        Raises:
            ValueError: whatever `ClassStatistics.update` finds wrong with a batch, such as an unknown label.
        """
        batches, self._buffer = self._buffer, []
        for embeddings, labels in batches:
            if self.statistics is None:
                self.statistics = ClassStatistics(self.labels, embeddings.shape[1], forget=self.forget)
            self.statistics.update(embeddings, labels)
        return self.statistics

    def missing(self) -> torch.Tensor:
        """The labels of which there has been no sample, (M,) int64."""
        statistics = self.up_to_date()
        return self.labels if statistics is None else statistics.labels[statistics.counts == 0]
