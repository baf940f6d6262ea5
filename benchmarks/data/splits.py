"""Labelled images, and their split by class."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Dataset

TEST_SHARE = 0.5  # of all classes, as usual in metric learning
VALIDATION_SHARE = 0.2  # of the other classes
SPLIT_SEED = 2018  # the year of the paper; the split never changes


class LabelledImages(Dataset):
    """Images in memory: (N, channels, height, width) float32 and their labels (N,) int64."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])

    def first_of(self, label: int) -> torch.Tensor:
        """The first image of a class."""
        return self.images[int((self.labels == label).nonzero()[0, 0])]


@dataclass(frozen=True)
class Splits:
    """Images of disjoint classes. Classes are numbered 0 .. C - 1, those of `train` first, then `val`, then `test`."""

    name: str
    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    class_names: list[str]  # by label

    def describe(self) -> dict[str, int | str]:
        """Name and sizes, for the results file."""
        sizes: dict[str, int | str] = {"name": self.name}
        for split in ("train", "val", "test"):
            images = getattr(self, split)
            sizes[f"{split}_images"] = len(images)
            sizes[f"{split}_classes"] = len(images.labels.unique())
        return sizes


def split_by_class(name: str, images: torch.Tensor, labels: np.ndarray, class_names: list[str]) -> Splits:
    """Half of the classes to test, a fifth of the others to validate, drawn once and for all with a fixed seed.

    `labels` (N,) number the classes in the order of `class_names`; the result numbers them anew, split by split.
    """
    num_classes = len(class_names)
    order = np.random.default_rng(SPLIT_SEED).permutation(num_classes)  # train, then val, then test
    num_test = round(TEST_SHARE * num_classes)
    num_val = round(VALIDATION_SHARE * (num_classes - num_test))
    bounds = np.cumsum([0, num_classes - num_test - num_val, num_val, num_test])
    new_labels = torch.from_numpy(np.argsort(order)[labels])

    def part(start: int, end: int) -> LabelledImages:
        inside = (new_labels >= start) & (new_labels < end)
        return LabelledImages(images[inside], new_labels[inside])

    train, val, test = (part(start, end) for start, end in pairwise(bounds))
    return Splits(name, train, val, test, [class_names[old] for old in order])


def fold(splits: Splits, number: int, of: int = 4) -> Splits:
    """The training classes in two: part `number` of `of` equal parts to validate on, the others to train on.

    The parts are drawn once and for all. Classes are numbered anew, those of `train` first, then `val`; those of the whole
    set's validation classes are left out, and `test` stays as it is.
    """
    labels = splits.train.labels
    num_classes = int(labels.max()) + 1
    if not 0 <= number < of <= num_classes:
        raise ValueError(f"there are parts 0 .. {of - 1} of {num_classes} training classes, but not {number}")
    shuffled = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(num_classes))
    held_out = torch.zeros(num_classes, dtype=torch.bool)
    held_out[shuffled[number::of]] = True
    order = torch.argsort(held_out.int(), stable=True)  # old labels by new ones
    new_labels = torch.argsort(order)

    def part(wanted: torch.Tensor) -> LabelledImages:
        inside = wanted[labels]
        return LabelledImages(splits.train.images[inside], new_labels[labels[inside]])

    names = [splits.class_names[old] for old in order.tolist()] + splits.class_names[num_classes:]
    return Splits(splits.name, part(~held_out), part(held_out), splits.test, names)
