"""Class statistics of the batches that a loss sees anyway, for a refresh without a pass over the data set."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from .batches import check_embeddings, check_lengths
from .labels import Labels, label_tensor, positions
from .statistics import ClassStatistics

BUFFERED_BATCHES = 16
MAX_BROKEN_BATCHES = 16


class LossWatch:
    """Keeps class statistics of the embeddings that a loss is called with, by a torch forward pre-hook.

    Only calls that train count: of a loss in training mode, with gradients enabled and embeddings that require one.
    Reference embeddings (of a memory) do not count. Neither does a batch with values that are not finite, which mixed
    precision meets now and then; sixteen of them in a row are an error. The statistics follow a few batches behind
    (`up_to_date` catches up), so that a GPU is not waited for in each step.

    A loss that is copied or pickled alone is not watched, and takes no statistics along. A watch that is copied or pickled
    brings its loss, and goes on watching that. When a watch is gone, nothing is done for it any more.

    Args:
        loss: a module that is called with `(embeddings, labels, ...)`, (B, D) and (B,).
        labels: of the training set, as the loss sees them.
        forget: of `ClassStatistics`.

    Raises:
        ValueError: `forget` is not in (0, 1]. When the loss is called: a label that is not among `labels` (at once if it is
            on the host, a few batches later if not), no labels, shapes that are no batch or of another embedding size than
            before, or whatever `up_to_date` raises. The batch does not count then.
        TypeError: when the loss is called, labels that are not integers.
    """

    def __init__(self, loss: torch.nn.Module, labels: torch.Tensor, forget: float) -> None:
        self.loss = loss
        self.labels = label_tensor(labels, "cpu").unique()
        self.forget = ClassStatistics(self.labels, 1, forget=forget).forget  # checked now, not in the first batch
        self.statistics: ClassStatistics | None = None
        self.embedding_size: int | None = None  # until a batch tells
        self._buffer: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_broken = 0  # batches in a row that were not finite
        self._attach()

    def note(self, embeddings: Any, labels: Labels | None) -> None:
        """Takes note of a batch with which the loss is called: (B, D) and (B,)."""
        if not (self.loss.training and torch.is_grad_enabled() and getattr(embeddings, "requires_grad", False)):
            return
        if labels is None:
            raise ValueError('mode="streaming" needs the labels of every batch: call the loss with embeddings and labels')
        labels = label_tensor(labels)
        check_embeddings(embeddings, size=self.embedding_size)
        check_lengths(embeddings, labels)
        if labels.device.type == "cpu":  # a wrong one is named in its own batch
            positions(labels, self.labels, "the refresh")
        self.embedding_size = embeddings.shape[1]
        self._buffer.append((embeddings.detach().clone(), labels.clone()))
        if len(self._buffer) >= BUFFERED_BATCHES:
            self.up_to_date()

    def up_to_date(self) -> ClassStatistics | None:
        """The statistics of all batches so far; None if there were none.

        Raises:
            ValueError: an unknown label, or sixteen batches in a row that were NaN or infinite.
        """
        while self._buffer:  # one by one, so that a batch that is refused, or Ctrl-C, loses no others
            embeddings, labels = self._buffer.pop(0)
            if not torch.isfinite(embeddings).all():
                self._num_broken += 1
                continue
            if self.statistics is None:
                self.statistics = ClassStatistics(self.labels, embeddings.shape[1], forget=self.forget)
            self.statistics.update(embeddings, labels)
            self._num_broken = 0
        if self._num_broken >= MAX_BROKEN_BATCHES:
            raise ValueError(
                f"the last {self._num_broken} batches had embeddings that are NaN or infinite; has the training diverged?"
            )
        return self.statistics

    def missing(self) -> torch.Tensor:
        """The labels of which there has been no sample, (M,) int64."""
        statistics = self.up_to_date()
        return self.labels if statistics is None else statistics.labels[statistics.counts == 0]

    def _attach(self) -> None:
        hook = _Hook(self)
        handle = self.loss.register_forward_pre_hook(hook, with_kwargs=True)
        # PML's record-keeper writes down the numbers in all dictionaries of a loss, and fails over torch's {id: True} here.
        # Torch asks only whether the id is there.
        self.loss._forward_pre_hooks_with_kwargs[handle.id] = hook

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()


class _Hook:
    """Hands each call of a loss to a watch, as long as there is one; changes nothing in the call."""

    def __init__(self, watch: LossWatch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, loss: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = self._watch()
        if watch is None:
            return
        given = {**dict(zip(("embeddings", "labels"), args, strict=False)), **kwargs}
        watch.note(given.get("embeddings"), given.get("labels"))

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoHook, ()


class _NoHook:
    """What becomes of the hook in a copy of the loss."""

    def __call__(self, loss: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pass
