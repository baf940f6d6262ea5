"""What a method of the comparison is: a loss with the miner and the sampler that belong to it, made for a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import samplers

from pml_htl import AnchorNeighborSampler, ClassTree, HierarchicalTripletLoss

from ..common.ranks import number_of_processes
from .sampling import SAMPLERS

Settings = dict[str, Any]  # numbers and words


@dataclass(frozen=True)
class Task:
    """What every method is given."""

    labels: torch.Tensor  # (N,) of the training images, classes 0 .. C - 1
    batch_size: int
    embedding_size: int
    iterations: int  # of an epoch
    seed: int

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


class Learning(NamedTuple):
    """A loss with what belongs to it; `learning_rate` is that of the loss's own parameters, if it has any."""

    loss: torch.nn.Module
    miner: torch.nn.Module | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Parts:
    """What a method trains with. A `tree` is to be refreshed; `loss_lr` is the learning rate of the loss's parameters."""

    loss: torch.nn.Module
    sampler: torch.utils.data.Sampler[Any]
    miner: torch.nn.Module | None = None
    tree: ClassTree | None = None
    loss_lr: float | None = None
    warmup_epochs: int = 1  # before the first refresh
    refresh_every: int = 1  # epochs
    forget: float | None = None  # with a number the tree is refreshed from the training batches


@dataclass(frozen=True)
class Method:
    """A row of the comparison: what it is, how to make its loss, and its settings with their defaults."""

    name: str
    description: str
    learn: Callable[[Task, Settings, ClassTree], Learning]
    own_defaults: Settings

    @property
    def defaults(self) -> Settings:
        """Those of the method, and the settings that every method has."""
        return {**COMMON, **self.own_defaults}

    def parse(self, setting: str, text: str) -> Any:
        """The value of a setting from the command line, of the type of its default.

        Raises:
            ValueError: it is of another type.
        """
        kind = type(self.defaults[setting])
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{setting} of {self.name} must be a {kind.__name__}, but it is {text!r}") from None

    def build(self, task: Task, settings: Settings) -> Parts:
        """Loss, sampler and what else the method trains with."""
        tree = ClassTree(settings.get("num_levels", 16), linkage=settings.get("linkage", "single"))
        if settings["sampling"] in SAMPLERS:
            sampler: torch.utils.data.Sampler[Any] = neighbors(task, settings, tree)
        elif settings["sampling"] == "per-class":
            sampler = m_per_class(task, settings)
        else:
            known = ", ".join(SAMPLERS)
            raise ValueError(f"sampling must be per-class or one of {known}, but it is {settings['sampling']!r}")
        loss, miner, learning_rate = self.learn(task, settings, tree)
        has_tree = isinstance(sampler, AnchorNeighborSampler) or isinstance(loss, HierarchicalTripletLoss)
        return Parts(
            loss,
            sampler,
            miner,
            tree if has_tree else None,
            loss_lr=learning_rate,
            warmup_epochs=settings["warmup_epochs"],
            refresh_every=settings["refresh_every"],
            forget=settings.get("forget"),
        )


COMMON: Settings = {
    "learning_rate": 2e-3,
    "sampling": "per-class",
    "samples_per_class": 4,
    "neighborhood_size": 4,  # matters with sampling=neighbors alone
    "warmup_epochs": 1,  # before the first refresh; matters with a tree alone, for the sampling or for the margins
    "refresh_every": 1,  # epochs; likewise
}
NEIGHBORS: Settings = {"sampling": "neighbors"}


def m_per_class(task: Task, settings: Settings) -> samplers.MPerClassSampler:
    per_class = settings["samples_per_class"]
    if per_class < 1 or task.batch_size % per_class or task.batch_size > per_class * task.num_classes:
        raise ValueError(
            f"the batch size must be a multiple of samples_per_class={per_class} and at most {per_class} of each of the "
            f"{task.num_classes} classes, but it is {task.batch_size}"
        )
    # Each process has its part of the batch, of classes that the others may have as well.
    batch_size = task.batch_size // number_of_processes()
    if batch_size % per_class:
        raise ValueError(f"{number_of_processes()} processes cannot share {task.batch_size // per_class} classes evenly")
    # Its length is that of an epoch, since the data begin anew after each.
    length = batch_size * task.iterations
    return samplers.MPerClassSampler(task.labels, per_class, batch_size, length)


def neighbors(task: Task, settings: Settings, tree: ClassTree) -> AnchorNeighborSampler:
    group = settings["neighborhood_size"] * settings["samples_per_class"]
    if group < 1 or task.batch_size % group:
        raise ValueError(f"the batch size must be a multiple of {group} (neighborhood x samples), not {task.batch_size}")
    # Any neighbour may be taken by the other classes of a batch, so as many are kept as a batch has.
    tree.max_neighbors = max(tree.max_neighbors, task.batch_size // settings["samples_per_class"] - 1)
    return SAMPLERS[settings["sampling"]](
        task.labels,
        tree,
        num_anchors=task.batch_size // group,
        neighborhood_size=settings["neighborhood_size"],
        samples_per_class=settings["samples_per_class"],
        seed=task.seed,
    )
