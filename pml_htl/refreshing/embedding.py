"""One pass of a network over a data set, into class statistics, that leaves no trace: no gradient, mode or random state."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ..common.batches import check_embeddings, check_lengths
from ..common.labels import Labels, label_tensor
from ..distributed import Ranks
from ..tree import ClassStatistics

REFRESH = "the refresh of the class tree"
COUNTED = 1024  # samples at a time

Batches: TypeAlias = Iterable[tuple[Any, Labels]]  # inputs of B samples and their labels (B,)
Sample: TypeAlias = tuple[torch.Tensor, torch.Tensor, list[Any]]  # embeddings, labels, and the inputs of each batch


def collect_statistics(
    models: list[torch.nn.Module], embed: Callable[[Any], torch.Tensor], batches: Batches, ranks: Ranks
) -> ClassStatistics:
    """The class statistics of the embeddings that `embed` makes of `batches` by `models`; O(C D) memory.

    Beside the models it takes O((N + C) D log C) time for N samples, in whatever order their classes come.

    With several `ranks` each has batches of its own, and statistics of these; what fails on one fails on all. If the models
    are sharded, all ranks enter each forward pass together. One that has no more batches repeats its last, which does not
    count again. An error in the forward pass itself is raised where it is, and the others learn of it only by torch, when
    that process ends or the group's timeout is over: they are in the midst of it, waiting for weights.

    Raises:
        ValueError: no batches, labels that are not one per sample, and whatever `ClassStatistics.update` raises.
        TypeError: labels that are not integers, or a model that makes anything else than a tensor of floats.
        RuntimeError: another rank has failed; names it and its error.
    """
    # Ranks learn of each other's failures at the end; or in every step, before they enter a forward pass that needs all.
    in_step = ranks.size > 1 and is_sharded(models)
    every_step, all_steps = (ranks, Ranks.alone()) if in_step else (Ranks.alone(), ranks)
    put_back = _what_is(models)
    try:
        with all_steps.together(REFRESH), _eval_mode(models), _sharded_again(models), kept_random_states(), torch.no_grad():
            return _collect(embed, batches, every_step)
    except BaseException:
        put_back()  # Ctrl-C may have come while the contexts above did so
        raise


def embed_sample(models: list[torch.nn.Module], embed: Callable[[Any], torch.Tensor], batches: Batches) -> Sample:
    """Embeddings (N, D) and labels (N,) on the host, and the inputs of each batch; leaves no trace either.

    Raises:
        ValueError: the models are sharded, and so embed together or not at all.
    """
    if is_sharded(models):
        raise ValueError("a sample for TensorBoard is embedded by one process, which models of FSDP do not allow")
    with _eval_mode(models), kept_random_states(), torch.no_grad():
        found = [(embed(inputs).cpu().float(), label_tensor(labels, "cpu"), inputs) for inputs, labels in batches]
    embeddings, labels, inputs = zip(*found, strict=True)
    return torch.cat(embeddings), torch.cat(labels), list(inputs)


def is_sharded(models: list[torch.nn.Module]) -> bool:
    """Whether a forward pass gathers weights from other processes, by FSDP or FSDP2."""
    return any(_modules_of(kind, models) for kind in ("FullyShardedDataParallel", "FSDPModule"))


def _modules_of(kind: str, models: list[torch.nn.Module]) -> list[Any]:
    """The modules that are of a class of torch.distributed.fsdp, without importing that where nobody else has."""
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), kind, None)
    return [module for model in models for module in model.modules() if cls is not None and isinstance(module, cls)]


def _collect(embed: Callable[[Any], torch.Tensor], batches: Batches, ranks: Ranks) -> ClassStatistics:
    """Statistics of this rank's batches; all ranks make as many forward passes."""
    counted = _Counted()
    remaining, inputs = iter(batches), None
    while True:
        with ranks.together(REFRESH):
            batch = next(remaining, None)
        if not any(ranks.gather(batch is not None)):
            break
        if batch is not None:
            inputs, labels = batch
        embeddings = embed(inputs)  # outside `together`: all may wait here for each other
        with ranks.together(REFRESH):
            if batch is not None:
                counted.add(embeddings, labels)
    with ranks.together(REFRESH):
        return counted.statistics()


class _Counted:
    """Class statistics of embeddings that come batch by batch, of classes that are not known beforehand."""

    def __init__(self) -> None:
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # counted many at a time, since each time costs
        self._parts: list[ClassStatistics] = []
        self._size: int | None = None

    def add(self, embeddings: torch.Tensor, labels: Labels) -> None:
        """A batch (B, D) and (B,); raises as `collect_statistics` says."""
        labels = label_tensor(labels, "cpu")
        if labels.ndim != 1:
            raise ValueError(
                f"the labels of a batch are of shape {tuple(labels.shape)}, but a class tree has one label per sample: "
                "give the trainer a single label_hierarchy_level"
            )
        check_embeddings(embeddings, "the embeddings that the model makes", self._size)
        check_lengths(embeddings, labels)
        self._size = embeddings.shape[1]
        self._waiting.append((embeddings.to("cpu", copy=True), labels))  # the model may use its memory again
        if sum(len(some) for _, some in self._waiting) >= COUNTED:
            self._count()

    def statistics(self) -> ClassStatistics:
        """Those of all batches."""
        if self._waiting:
            self._count()
        while len(self._parts) > 1:
            self._join_last()
        if not self._parts:
            raise ValueError("the data set of the refresh is empty; give the training set under its evaluation transform")
        return self._parts[0]

    def _count(self) -> None:
        embeddings, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self._parts.append(ClassStatistics(labels, embeddings.shape[-1]).update(embeddings, labels))
        # Parts are joined when they are about as large, so that new classes in every batch do not copy all old ones.
        while len(self._parts) > 1 and 2 * len(self._parts[-1].labels) >= len(self._parts[-2].labels):
            self._join_last()

    def _join_last(self) -> None:
        last = self._parts.pop()
        self._parts[-1].add_classes(last.labels).merge(last.add_classes(self._parts[-1].labels))


def inputs_and_labels(batch: Any) -> tuple[Any, Labels]:
    """A batch that is such a pair, as one; a `ValueError` that says what else it is."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        given = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        raise ValueError(
            f"a batch of the refresh's data set is {given}, but must be a pair (inputs, labels); "
            "give a data_and_label_getter that makes one of it"
        )
    return batch[0], batch[1]


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


def evenly_spaced(dataset: Dataset[Any], most: int) -> Dataset[Any]:
    """At most so many samples of a data set, at even steps: always the same."""
    assert hasattr(dataset, "__len__")  # `TreeRefresh` has refused others
    return Subset(dataset, torch.linspace(0, len(dataset) - 1, min(len(dataset), most)).round().long().tolist())


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


@contextmanager
def _sharded_again(models: list[torch.nn.Module]) -> Iterator[None]:
    """Afterwards weights of FSDP2 are in parts. It keeps the outermost whole for a backward pass, which does not come."""
    try:
        yield
    finally:
        for module in _modules_of("FSDPModule", models):
            module.reshard()


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
