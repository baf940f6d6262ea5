"""One pass of a network over a data set, into class statistics, that leaves no trace: no gradient, mode or random state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ..common.batches import check_embeddings
from ..common.labels import Labels, label_tensor
from ..distributed import Ranks
from ..tree import ClassStatistics

Batches: TypeAlias = Iterable[tuple[torch.Tensor, Labels]]  # embeddings (B, D) and labels (B,)


def collect_statistics(models: list[torch.nn.Module], batches: Batches) -> ClassStatistics:
    """The class statistics of embeddings that `models` make while `batches` is iterated; O(C D) memory.

    Beside the models it takes O((N + C) D log C) time for N samples, in whatever order their classes come.

    Raises:
        ValueError: no batches, labels that are not one per sample, and whatever `ClassStatistics.update` raises.
        TypeError: labels that are not integers, or a model that makes anything else than a tensor of floats.
    """
    put_back = _what_is(models)
    try:
        with _eval_mode(models), kept_random_states(), torch.no_grad():
            return _collect(batches)
    except BaseException:
        put_back()  # Ctrl-C may have come while the contexts above did so
        raise


def _collect(batches: Batches) -> ClassStatistics:
    parts: list[ClassStatistics] = []
    for embeddings, labels in batches:
        labels = label_tensor(labels)
        if labels.ndim != 1:
            raise ValueError(
                f"the labels of a batch are of shape {tuple(labels.shape)}, but a class tree has one label per sample: "
                "give the trainer a single label_hierarchy_level"
            )
        check_embeddings(embeddings, "the embeddings that the model makes")
        parts.append(ClassStatistics(labels, embeddings.shape[-1]).update(embeddings, labels))
        # Parts are joined when they are about as large, so that new classes in every batch do not copy all old ones.
        while len(parts) > 1 and 2 * len(parts[-1].labels) >= len(parts[-2].labels):
            _join_last(parts)
    while len(parts) > 1:
        _join_last(parts)
    if not parts:
        raise ValueError("the data set of the refresh is empty; give the training set under its evaluation transform")
    return parts[0]


def inputs_and_labels(batch: Any) -> tuple[Any, Labels]:
    """A batch that is such a pair, as one; a `ValueError` that says what else it is."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        given = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        raise ValueError(
            f"a batch of the refresh's data set is {given}, but must be a pair (inputs, labels); "
            "give a data_and_label_getter that makes one of it"
        )
    return batch[0], batch[1]


def _join_last(parts: list[ClassStatistics]) -> None:
    last = parts.pop()
    parts[-1].add_classes(last.labels).merge(last.add_classes(parts[-1].labels))


def make_loader(
    dataset: Dataset[Any], batch_size: int, num_workers: int, collate_fn: Callable[..., Any] | None
) -> DataLoader[Any]:
    """A loader that draws nothing from the global random generator, from which the training draws."""
    return DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn, generator=torch.Generator()
    )


def share_of(dataset: Dataset[Any], ranks: Ranks) -> Dataset[Any]:
    """Every sample for one of the ranks: the first for the first, the second for the second and so on.

    Raises:
        ValueError: there are not enough, or they cannot be counted.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) < ranks.size:
        number = f"{len(dataset)} samples" if hasattr(dataset, "__len__") else "no length"
        raise ValueError(
            f"{ranks.size} processes share the pass over the refresh's data set, which needs an index and at least a sample "
            f"for each, but this {type(dataset).__name__} has {number}"
        )
    return Subset(dataset, range(ranks.rank, len(dataset), ranks.size))


def subset_per_class(
    dataset: Dataset[Any], labels: np.ndarray, samples_per_class: int, generator: np.random.Generator
) -> Dataset[Any]:
    """At most so many random samples of each class, in the order of the data set, whose labels are given (N,)."""
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Subset(dataset, np.sort(by_class[rank_in_class < samples_per_class]).tolist())


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Afterwards the global generators of Python, NumPy and torch (CPU and CUDA) are as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _eval_mode(models: list[torch.nn.Module]) -> Iterator[None]:
    """All modules in eval mode; afterwards each is as it was, also those that were frozen one by one."""
    put_back = _modes_of(models)
    try:
        for model in models:
            model.eval()
        yield
    finally:
        put_back()


def _modes_of(models: list[torch.nn.Module]) -> Callable[[], None]:
    """Puts the modes of all modules back to what they are now.

    Modes are changed by `train()` and `eval()`, since modules may do more there (LoRA layers merge their weights).
    """
    trained = [model for model in models if model.training]
    modes = [(module, module.training) for model in models for module in model.modules()]

    def put_back() -> None:
        for model in trained:
            model.train()
        for module, training in modes:
            module.training = training

    return put_back


def _what_is(models: list[torch.nn.Module]) -> Callable[[], None]:
    """Puts gradients, modes and random states back to what they are now."""
    gradients, modes = torch.is_grad_enabled(), _modes_of(models)
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all()

    def put_back() -> None:
        torch.set_grad_enabled(gradients)
        modes()
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        torch.cuda.set_rng_state_all(of_gpus)

    return put_back
