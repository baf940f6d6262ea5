"""Keeping the tree current while the network trains (method, section 5)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ._pml import process_label, to_device
from .labels import Labels, integer_at_least, label_tensor, name_some
from .samplers import AnchorNeighborSampler
from .statistics import ClassStatistics
from .tree import ClassTree

Batches = Iterator[tuple[torch.Tensor, Labels]]  # embeddings (B, D) and labels (B,)


class TreeRefresh:
    """Fits the tree to the current embeddings of the training set; an `end_of_epoch_hook` of PML's trainers.

    These are the trainers whose batches are (data, labels): `MetricLossOnly`, `TrainWithClassifier`.

    Each refresh is one pass over `dataset` in eval mode without gradients, batch by batch into the class statistics, so
    that memory is O(C D). Afterwards every module is in the mode it was in, and the trainer's next batch is drawn from
    the new tree. If anything fails the error goes on to the caller and the old tree stays.

    Args:
        tree: the tree that sampler and loss share.
        dataset: the training set under its evaluation transform, giving what the trainer's own data set gives.
        warmup_epochs: train this many epochs with the constant initial margin before the first refresh; with 0 there is
            one before the first batch too, by `before_training`.
        every_n_epochs: how many epochs from one refresh to the next.
        batch_size, num_workers: of the pass over `dataset`; `num_workers=None` takes the trainer's number.
        then: another end-of-epoch hook to call after each epoch, such as the one that PML's `HookContainer` makes (which
            so saves the new tree). What it returns is passed on: `False` ends the training.

    Attributes:
        num_refreshes, seconds: how many there have been, and how long all of them took.

    Raises:
        ValueError: while refreshing, whatever `ClassStatistics.update` and `ClassTree.fit` raise, or labels of the data
            set that are not those of the trainer's `AnchorNeighborSampler`.
        TypeError: `tree` is no ClassTree, or `then` cannot be called.
    """

    def __init__(
        self,
        tree: ClassTree,
        dataset: Dataset[Any],
        *,
        warmup_epochs: int = 1,
        every_n_epochs: int = 1,
        batch_size: int = 256,
        num_workers: int | None = None,
        then: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(tree, ClassTree):
            raise TypeError(f"tree must be a ClassTree, but it is a {type(tree).__name__}")
        if then is not None and not callable(then):
            raise TypeError(f"then must be a hook to call with the trainer, but it is {then!r}")
        self.tree = tree
        self.dataset = dataset
        self.warmup_epochs = integer_at_least(0, "warmup_epochs", warmup_epochs)
        self.every_n_epochs = integer_at_least(1, "every_n_epochs", every_n_epochs)
        self.batch_size = integer_at_least(1, "batch_size", batch_size)
        self.num_workers = None if num_workers is None else integer_at_least(0, "num_workers", num_workers)
        self.then = then
        self.num_refreshes = 0
        self.seconds = 0.0

    def __call__(self, trainer: Any) -> Any:
        """After an epoch of a PML trainer: refreshes if it is time to, then calls `then` and returns its verdict."""
        epochs_after_warmup = trainer.epoch - self.warmup_epochs
        if epochs_after_warmup >= 0 and epochs_after_warmup % self.every_n_epochs == 0:
            self._refresh_in(trainer)
        return None if self.then is None else self.then(trainer)

    def before_training(self, trainer: Any) -> None:
        """Before `trainer.train()`: refreshes if `warmup_epochs` is 0, for a network that is already trained."""
        if self.warmup_epochs == 0:
            self._refresh_in(trainer)

    def refresh(self, model: torch.nn.Module, *, device: torch.device | str | None = None) -> None:
        """The same in a plain training loop, for a data set that gives pairs (input, label).

        Args:
            model: from a batch of inputs to embeddings (B, D).
            device: where inputs go; default, where the model's parameters are.
        """
        if device is None:
            device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

        def batches() -> Batches:
            for inputs, labels in self._loader(self.num_workers or 0):
                yield model(to_device(inputs, device=device)), labels

        self._fit([model], batches(), known_labels=None)

    def _refresh_in(self, trainer: Any) -> None:
        def batches() -> Batches:
            num_workers = trainer.dataloader_num_workers if self.num_workers is None else self.num_workers
            for batch in self._loader(num_workers, trainer.collate_fn):
                data, labels = trainer.data_and_label_getter(batch)
                labels = process_label(labels, trainer.label_hierarchy_level, trainer.label_mapper)
                yield trainer.compute_embeddings(data), labels

        sampler = trainer.sampler
        known_labels = torch.from_numpy(sampler.classes) if isinstance(sampler, AnchorNeighborSampler) else None
        self._fit(list(trainer.models.values()), batches(), known_labels)
        if hasattr(trainer, "dataloader"):
            # Its iterator holds batches of the old tree, ready made by its workers, which end when it goes.
            trainer.dataloader_iter = _anew(trainer.dataloader)

    def _fit(self, models: list[torch.nn.Module], batches: Batches, known_labels: torch.Tensor | None) -> None:
        start = time.perf_counter()
        statistics = None
        with _eval_mode(models), torch.no_grad():
            for embeddings, labels in batches:
                labels = label_tensor(labels)
                if statistics is None:
                    statistics = ClassStatistics(labels if known_labels is None else known_labels, embeddings.shape[-1])
                if known_labels is None:
                    statistics.add_classes(labels)
                else:
                    _check_known(labels, known_labels)
                statistics.update(embeddings, labels)
        if statistics is None:
            raise ValueError("the data set of the refresh is empty; give the training set under its evaluation transform")
        self.tree.fit(statistics)
        self.num_refreshes += 1
        self.seconds += time.perf_counter() - start

    def _loader(self, num_workers: int, collate_fn: Callable[..., Any] | None = None) -> DataLoader[Any]:
        # A generator of its own, so that a refresh draws nothing from the global one that the training draws from.
        return DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            generator=torch.Generator(),
        )


def _anew(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader from its beginning; its workers start with the first of them, not before."""
    yield from loader


@contextmanager
def _eval_mode(models: list[torch.nn.Module]) -> Iterator[None]:
    """All modules in eval mode; afterwards each is as it was, also those that were frozen one by one."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_known(labels: torch.Tensor, known_labels: torch.Tensor) -> None:
    unknown = labels[~torch.isin(labels.cpu(), known_labels)]
    if len(unknown):
        raise ValueError(
            f"{name_some(unknown)} of the refresh's data set (after the trainer's label mapping and hierarchy level) not "
            f"among the {len(known_labels)} classes of the AnchorNeighborSampler; give the sampler the labels as the "
            "trainer maps them"
        )
