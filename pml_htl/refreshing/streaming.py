"""Class statistics of the batches that a loss sees anyway, for a refresh without a pass over the data set."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import numpy as np
import torch

from ..common.batches import check_embeddings, check_lengths
from ..common.labels import Labels, integer_at_least, label_tensor, positions
from ..common.state import check_entries, check_labels, check_setting
from ..common.transforms import is_batched, lasting, outside_transforms
from ..distributed import Ranks
from ..tree.statistics import STATE, ClassStatistics

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
            before, batches of several models at once (`torch.func.vmap`), or whatever `up_to_date` raises. The batch does
            not count then.
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
        if is_batched(embeddings) or is_batched(labels):
            raise ValueError(
                'mode="streaming" cannot follow a loss under torch.func.vmap: each copy has embeddings of its own, and the '
                "tree is of one model; refresh the tree by a pass over the data set"
            )
        if labels.device.type == "cpu":  # a wrong one is named in its own batch
            positions(labels, self.labels, "the refresh")
        self.embedding_size = embeddings.shape[1]
        self._buffer.append((lasting(embeddings.detach().clone()), lasting(labels.clone())))
        if len(self._buffer) >= BUFFERED_BATCHES:
            with outside_transforms():
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

    def of_all(self, ranks: Ranks) -> ClassStatistics | None:
        """The statistics of all ranks, after `up_to_date` on each; None if no rank has seen a batch.

        They are added up, or where all ranks have seen the same samples those of one.
        """
        if ranks.size == 1:
            return self.statistics
        own = None if self.statistics is None else (self.statistics.embedding_size, self.statistics.fingerprint())
        seen = ranks.gather(own)
        sizes = [size for size, _ in filter(None, seen)]
        if not sizes:
            return None
        is_one_size = len(sizes) == ranks.size and len(set(sizes)) == 1
        if is_one_size and all(np.allclose(seen[0][1], other, rtol=1e-9, atol=1e-12) for _, other in seen):
            return self.statistics
        statistics = self.statistics
        if statistics is None:
            statistics = ClassStatistics(self.labels, sizes[0], forget=self.forget)
        return copy.deepcopy(statistics).all_reduce(ranks.group)

    def state_dict(self) -> dict[str, Any]:
        """The statistics of all batches so far, as copies: O(C D) memory. Raises what `up_to_date` does."""
        statistics = self.up_to_date()
        return {
            "labels": self.labels.clone(),
            "forget": self.forget,
            "num_broken": self._num_broken,
            "statistics": None if statistics is None else statistics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`; batches noted before are forgotten.

        Raises:
            ValueError: it is not such a state, or of other labels or another `forget`. Nothing has changed then.
        """
        owner = type(self).__name__
        check_entries(state, ("labels", "forget", "num_broken", "statistics"), owner)
        check_setting("forget", state["forget"], self.forget, owner)
        check_labels(state["labels"], self.labels, owner)
        num_broken = integer_at_least(0, "num_broken of the state", state["num_broken"])
        statistics = None
        if state["statistics"] is not None:
            check_entries(state["statistics"], STATE, ClassStatistics.__name__)
            statistics = ClassStatistics(self.labels, state["statistics"]["embedding_size"], forget=self.forget)
            statistics.load_state_dict(state["statistics"])
        self.statistics, self._num_broken, self._buffer = statistics, num_broken, []
        self.embedding_size = None if statistics is None else statistics.embedding_size

    def _attach(self) -> None:
        hook = _Hook(self)
        handle = self.loss.register_forward_pre_hook(hook, with_kwargs=True)
        # PML's record-keeper writes down the numbers in all dictionaries of a loss, and fails over torch's {id: True} here.
        # Torch asks only whether the id is there.
        ids_with_kwargs: dict[int, Any] = self.loss._forward_pre_hooks_with_kwargs
        ids_with_kwargs[handle.id] = hook

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
