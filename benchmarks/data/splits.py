"""Labelled images, and their split by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

TEST_SHARE = 0.5  # of all classes, as usual in metric learning
VALIDATION_SHARE = 0.2  # of the other classes
SPLIT_SEED = 2018  # the year of the paper; the split never changes


class Images(Protocol):
    """A data set of images: an item is an image (channels, height, width) float32 and its label."""

    labels: torch.Tensor  # (N,) int64

    @property
    def channels(self) -> int:
        """Of each image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]: ...

    def part(self, inside: torch.Tensor, labels: torch.Tensor) -> Any:
        """The images where `inside` (N,) is true, with new labels."""

    def evaluation(self) -> Any:
        """The same images as an evaluation sees them."""

    def picture(self, index: int) -> torch.Tensor:
        """An image to look at, in 0..1: (channels, height, width)."""

    def pictures_of(self, label: int, most: int = 1) -> list[torch.Tensor]:
        """The first images of a class, at most so many."""
        return [self.picture(index) for index in (self.labels == label).nonzero().flatten()[:most].tolist()]


class LabelledImages(Dataset[tuple[torch.Tensor, int]], Images):
    """Images in memory: (N, channels, height, width) uint8 and their labels (N,) int64; an item is float32 in 0..1."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images = images
        self.labels = labels

    @property
    def channels(self) -> int:
        """See `Images`."""
        return self.images.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index] / 255, int(self.labels[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        """What torch's loaders ask for instead, a batch at a time."""
        return list(zip(self.images[indices] / 255, self.labels[indices].tolist(), strict=True))

    def part(self, inside: torch.Tensor, labels: torch.Tensor) -> LabelledImages:
        """See `Images`."""
        return LabelledImages(self.images[inside], labels)

    def evaluation(self) -> LabelledImages:
        """Themselves: the network changes them in training, a batch at a time."""
        return self

    def picture(self, index: int) -> torch.Tensor:
        """See `Images`."""
        return self.images[index] / 255


@dataclass(frozen=True)
class Splits:
    """Images of disjoint classes. Classes are numbered 0 .. C - 1, those of `train` first, then `val`, then `test`.

    With a `gallery`, images of the test classes, those of `test` are looked up in it instead of among each other.
    """

    name: str
    train: Images
    val: Images
    test: Images
    class_names: list[str]  # by label
    gallery: Images | None = None
    recall_at: tuple[int, ...] = ()  # the usual ones of the data set
    twins: tuple[tuple[int, int], ...] = ()  # labels of training classes that are one, by the label noise of `with_noise`

    def describe(self) -> dict[str, int | str]:
        """Name and sizes, for the results file."""
        sizes: dict[str, int | str] = {"name": self.name}
        for split in ("train", "val", "test", "gallery"):
            images = getattr(self, split)
            if images is not None:
                sizes[f"{split}_images"] = len(images)
                sizes[f"{split}_classes"] = len(images.labels.unique())
        return sizes


def split_by_class(name: str, images: Images, class_names: list[str], recall_at: tuple[int, ...] = ()) -> Splits:
    """Half of the classes to test, a fifth of the others to validate, drawn once and for all with a fixed seed.

    The labels of `images` number the classes in the order of `class_names`; the result numbers them anew.
    """
    num_classes = len(class_names)
    num_test = round(TEST_SHARE * num_classes)
    num_val = round(VALIDATION_SHARE * (num_classes - num_test))
    order = np.random.default_rng(SPLIT_SEED).permutation(num_classes)  # train, then val, then test
    bounds = np.cumsum([num_classes - num_test - num_val, num_val])
    train, val, test = np.split(order, bounds)
    return Splits(
        name,
        take(images, train, 0),
        take(images, val, bounds[0]),
        take(images, test, bounds[1]),
        [class_names[old] for old in order],
        recall_at=recall_at,
    )


def split_as_given(
    name: str, train: Images, test: Images, gallery: Images | None, class_names: list[str], recall_at: tuple[int, ...]
) -> Splits:
    """The usual test classes of a data set, and a fifth of its training classes to validate, with a fixed seed.

    Labels number the classes in the order of `class_names`; those of `train` and `test` are disjoint.
    """
    classes, test_classes = np.unique(train.labels), np.unique(test.labels)
    shared = np.intersect1d(classes, test_classes)
    if len(shared):
        raise ValueError(f"{class_names[shared[0]]} is a training class and a test class of {name}")
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(classes)
    num_val = round(VALIDATION_SHARE * len(classes))
    kept, val = shuffled[num_val:], shuffled[:num_val]
    first_test = len(classes)
    return Splits(
        name,
        take(train, kept, 0),
        take(train, val, len(kept)).evaluation(),
        take(test, test_classes, first_test).evaluation(),
        [class_names[old] for old in (*kept, *val, *test_classes)],
        None if gallery is None else take(gallery, test_classes, first_test).evaluation(),
        recall_at,
    )


def fold(splits: Splits, number: int, of: int = 4) -> Splits:
    """The training classes in two: part `number` of `of` equal parts to validate on, the others to train on.

    The parts are drawn once and for all. Classes are numbered anew, those of `train` first, then `val`; those of the whole
    set's validation classes are left out, and `test` stays as it is.
    """
    num_classes = int(splits.train.labels.max()) + 1
    if not 0 <= number < of <= num_classes:
        raise ValueError(f"there are parts 0 .. {of - 1} of {num_classes} training classes, but not {number}")
    held_out = np.zeros(num_classes, dtype=bool)
    held_out[np.random.default_rng(SPLIT_SEED).permutation(num_classes)[number::of]] = True
    kept, val = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    return Splits(
        splits.name,
        take(splits.train, kept, 0),
        take(splits.train, val, len(kept)).evaluation(),
        splits.test,
        [splits.class_names[old] for old in (*kept, *val)] + splits.class_names[num_classes:],
        splits.gallery,
        splits.recall_at,
    )


def capped(splits: Splits, samples_per_class: int) -> Splits:
    """At most so many training images of each class, drawn once and for all; the other parts stay as they are."""
    return replace(splits, train=some_of_each(splits.train, samples_per_class))


def fewer_classes(splits: Splits, num_classes: int) -> Splits:
    """The first so many training classes, which are in random order; the other parts stay as they are.

    Raises:
        ValueError: there are not so many.
    """
    known = int(splits.train.labels.max()) + 1
    if num_classes > known:
        raise ValueError(f"{splits.name} has {known} training classes, but {num_classes} are wanted; lower --classes")
    inside = splits.train.labels < num_classes
    return replace(splits, train=splits.train.part(inside, splits.train.labels[inside]))


def with_noise(splits: Splits, split_share: float, wrong_share: float) -> Splits:
    """Training classes with wrong labels, as data sets have them; the other parts stay as they are, but for their numbers.

    Args:
        split_share: of the classes; half of the images of each are one more class, a twin.
        wrong_share: of the images; each gets the label of another class at random.
    """
    generator = np.random.default_rng(SPLIT_SEED)
    labels = splits.train.labels.numpy().copy()
    num_classes = int(labels.max()) + 1
    split = np.sort(generator.permutation(num_classes)[: round(split_share * num_classes)])
    for twin, original in enumerate(split, start=num_classes):
        inside = generator.permutation(np.flatnonzero(labels == original))
        labels[inside[: len(inside) // 2]] = twin
    wrong = generator.permutation(len(labels))[: round(wrong_share * len(labels))]
    total = num_classes + len(split)
    labels[wrong] = (labels[wrong] + generator.integers(1, total, len(wrong))) % total
    names = splits.class_names
    moved = {
        part: images.part(torch.ones(len(images), dtype=torch.bool), images.labels + len(split))
        for part in ("val", "test", "gallery")
        if (images := getattr(splits, part)) is not None
    }
    return replace(
        splits,
        train=splits.train.part(torch.ones(len(labels), dtype=torch.bool), torch.from_numpy(labels)),
        twins=tuple((int(original), twin) for twin, original in enumerate(split, start=num_classes)),
        class_names=[*names[:num_classes], *(f"{names[original]} (twin)" for original in split), *names[num_classes:]],
        **moved,
    )


def some_of_each(images: Images, samples_per_class: int) -> Any:
    """At most so many images of each class, drawn with a fixed seed."""
    labels = images.labels.numpy()
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    inside = torch.zeros(len(labels), dtype=torch.bool)
    inside[by_class[np.arange(len(labels)) - starts < samples_per_class]] = True
    return images.part(inside, images.labels[inside])


def take(images: Images, classes: Sequence[int] | np.ndarray, first: int) -> Images:
    """The images of some classes, which are numbered anew from `first` on in the order given."""
    new_labels = torch.full((int(images.labels.max()) + 1,), -1)
    known = torch.as_tensor(np.asarray(classes))
    new_labels[known[known < len(new_labels)]] = torch.arange(first, first + len(known))[known < len(new_labels)]
    labels = new_labels[images.labels]
    return images.part(labels >= 0, labels[labels >= 0])
