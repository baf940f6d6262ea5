"""What a refresh reads from a PML trainer: its batches, its labels, and which part of the embedding a loss sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from .._pml import process_label
from ..common.labels import Labels, label_tensor, name_some
from ..samplers import AnchorNeighborSampler
from ..tree import ClassTree
from .embedding import kept_random_states, make_loader

SAMPLES_TO_COMPARE = 16
CHANGE_SAMPLER = (
    "give the sampler (or HTL) the labels as the trainer maps them, or change the trainer's set_min_label_to_zero, "
    "dataset_labels or label_hierarchy_level"
)


def streams_and_labels(trainer: Any, loader: Iterable[Any]) -> Iterator[tuple[Any, Labels]]:
    """What the trainer embeds, and labels as its loss gets them, batch by batch.

    A batch of `TwoStreamMetricLoss` has two streams of samples with the same labels; both count.
    """
    for batch in loader:
        *streams, labels = trainer.data_and_label_getter(batch)
        labels = process_label(labels, trainer.label_hierarchy_level, trainer.label_mapper)
        for data in streams:
            yield data, labels


def first_stream_and_labels(trainer: Any, loader: Iterable[Any]) -> Iterator[tuple[Any, Labels]]:
    """What the trainer embeds of samples that it does not train on, whose labels its mapping does not know."""
    for batch in loader:
        data, *_, labels = trainer.data_and_label_getter(batch)
        yield data, labels


@contextmanager
def without_ddp(models: dict[str, torch.nn.Module]) -> Iterator[None]:
    """A trainer's models without their DistributedDataParallel: in a forward pass that waits for the other processes, and
    would wait forever for one that has no more batches."""
    wrapped = dict(models)
    models.update({name: unwrapped(model) for name, model in wrapped.items()})
    try:
        yield
    finally:
        models.update(wrapped)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside a DistributedDataParallel."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def part_of_embedding(trainer: Any, tree: ClassTree) -> slice:
    """The columns that the loss or miner with this tree sees: all of them, but for a slice with `CascadedEmbeddings`.

    Raises:
        ValueError: losses or miners of several slices share the tree.
    """
    sizes = getattr(trainer, "embedding_sizes", None)
    if sizes is None:
        return slice(None)
    parts = {**trainer.loss_funcs, **trainer.mining_funcs}
    owners = [name for name, part in parts.items() if name[-1].isdigit() and any(m is tree for m in part.modules())]
    places = {int(name.rsplit("_", 1)[1]) for name in owners}  # PML's names: metric_loss_0, tuple_miner_0, ...
    if len(places) > 1:
        raise ValueError(
            f"{' and '.join(owners)} share one class tree, but each sees another slice of the embedding; "
            "give each loss a tree (an HTL) of its own, and a TreeRefresh for each, chained by `then`"
        )
    if not owners:
        return slice(None)
    (place,) = places
    start = sum(sizes[:place])
    return slice(start, start + sizes[place])


def check_watched(trainer: Any, loss: torch.nn.Module) -> None:
    """Raises a `ValueError` unless the trainer calls `loss` under one name, by itself or inside a wrapper."""
    names = [name for name, part in trainer.loss_funcs.items() if any(module is loss for module in part.modules())]
    if not names:
        raise ValueError(
            f"the {type(loss).__name__} that the refresh watches is not among the trainer's loss_funcs "
            f"({', '.join(trainer.loss_funcs)}), so it would see nothing; give TreeRefresh the loss that the trainer calls"
        )
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} are the loss that the refresh watches, and embeddings of all of them would count as the "
            'data set\'s; give each a loss of its own (losses may share a miner), or use mode="full"'
        )


def labels_of_samples(trainer: Any) -> torch.Tensor | None:
    """The labels that the trainer gives its loss for a few samples spread over its data set; None if it can't be indexed.

    Raises:
        ValueError: its `AnchorNeighborSampler` has other labels for them.
    """
    dataset, sampler = trainer.dataset, trainer.sampler
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return None
    ours = isinstance(sampler, AnchorNeighborSampler)
    last = min(len(dataset), len(sampler.labels)) - 1 if ours else len(dataset) - 1
    indices = np.unique(np.linspace(0, last, SAMPLES_TO_COMPARE).astype(int))
    with kept_random_states():
        loader = make_loader(Subset(dataset, indices.tolist()), len(indices), 0, trainer.collate_fn)
        *_, labels = trainer.data_and_label_getter(next(iter(loader)))
    labels = label_tensor(process_label(labels, trainer.label_hierarchy_level, trainer.label_mapper), "cpu")
    differing: np.ndarray = np.empty(0, dtype=np.int64)
    if ours and labels.ndim == 1:
        differing = np.flatnonzero(sampler.labels[indices] != labels.numpy())
    if len(differing):
        index, place = indices[differing[0]], differing[0]
        raise ValueError(
            f"sample {index} of the trainer's data set has label {sampler.labels[index]} in the AnchorNeighborSampler, but "
            f"the trainer gives its loss label {labels[place].item()}; {CHANGE_SAMPLER}"
        )
    return labels


def compare_labels(found: torch.Tensor, trainer: Any, samples: torch.Tensor | None, tree: ClassTree | None) -> None:
    """Compares the classes of the refresh's data set with those of the trainer's sampler, samples and tree.

    Args:
        found: (C,) the classes found in the data set.
        samples: labels on which the trainer trains, if they are known.
        tree: the tree before the first refresh; it has classes if it was fitted by someone else, or given.

    Raises:
        ValueError: a difference; says which labels differ and which side to change.
    """
    if isinstance(trainer.sampler, AnchorNeighborSampler):
        advice = f"{CHANGE_SAMPLER}, or give TreeRefresh the whole training set"
        compare_classes(found, label_tensor(trainer.sampler.classes), "the AnchorNeighborSampler", advice)
    if samples is not None:
        unknown = samples[~torch.isin(samples, found)]
        if len(unknown):
            raise ValueError(
                f"the trainer trains on {name_some(unknown)}, not in the refresh's data set of {len(found)} classes; "
                "give TreeRefresh the training set, under its evaluation transform"
            )
    known = None if tree is None else tree.all_labels
    if known is not None:
        advice = "change the trainer's label mapping to the labels of that tree, or begin with a new ClassTree"
        compare_classes(found, known.cpu(), "the class tree, as it was fitted, loaded or given before,", advice)


def compare_classes(found: torch.Tensor, known: torch.Tensor, owner: str, advice: str) -> None:
    """Raises a `ValueError` with `advice` unless the classes found in the refresh's data set are those that `owner` has."""
    for some, others, which in ((found, known, f"{owner} lacks"), (known, found, "the data set lacks")):
        missing = some[~torch.isin(some, others)]
        if len(missing):
            raise ValueError(
                f"the refresh's data set has {len(found)} classes (after the trainer's label mapping and hierarchy level), "
                f"{owner} has {len(known)}: {which} {name_some(missing)}; {advice}"
            )
