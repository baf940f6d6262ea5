"""The contenders: one entry a method, each a loss with the miner and the sampler that belong to it.

All see the same network, optimiser, number of iterations and batch size. A method's settings are its own hyperparameters;
`triplet:margin=0.1,distance=squared` on the command line changes some of them. Their defaults are the best on the
validation classes in `results/settings.json`, but for `htl` and `htl-margin`: these have the defaults of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, samplers

from pml_htl import HTL, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss

Settings = dict[str, Any]  # numbers and words


@dataclass(frozen=True)
class Task:
    """What every method is given."""

    labels: torch.Tensor  # (N,) of the training images, classes 0 .. C - 1
    batch_size: int
    embedding_size: int
    iterations: int
    seed: int

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class Parts:
    """What a method trains with. A `tree` is to be refreshed; `loss_lr` is the learning rate of the loss's parameters."""

    loss: torch.nn.Module
    sampler: torch.utils.data.Sampler
    miner: torch.nn.Module | None = None
    tree: ClassTree | None = None
    loss_lr: float | None = None


@dataclass(frozen=True)
class Method:
    """A row of the comparison: what it is, its settings with their defaults, and how to make its parts."""

    name: str
    description: str
    build: Callable[[Task, Settings], Parts]
    defaults: Settings = field(default_factory=dict)


PER_CLASS: Settings = {"samples_per_class": 4}
NEIGHBORHOOD: Settings = {"neighborhood_size": 4, "samples_per_class": 4}
TREE: Settings = {"num_levels": 16, "beta": 0.1, "initial_margin": 0.2, "distance": "squared"}


def m_per_class(task: Task, settings: Settings) -> samplers.MPerClassSampler:
    per_class = settings["samples_per_class"]
    if per_class < 1 or task.batch_size % per_class or task.batch_size > per_class * task.num_classes:
        raise ValueError(
            f"the batch size must be a multiple of samples_per_class={per_class} and at most {per_class} of each of the "
            f"{task.num_classes} classes, but it is {task.batch_size}"
        )
    # Its length is that of the whole training, so that it need not begin anew in the middle.
    length = task.batch_size * task.iterations
    return samplers.MPerClassSampler(task.labels, per_class, task.batch_size, length)


def distance_of(settings: Settings) -> distances.LpDistance:
    powers = {"plain": 1, "squared": 2}
    if settings["distance"] not in powers:
        raise ValueError(f"distance must be plain or squared, but it is {settings['distance']!r}")
    return distances.LpDistance(power=powers[settings["distance"]])


def triplet_loss(settings: Settings) -> losses.TripletMarginLoss:
    return losses.TripletMarginLoss(margin=settings["margin"], distance=distance_of(settings))


def htl(task: Task, settings: Settings) -> HTL:
    group = settings["neighborhood_size"] * settings["samples_per_class"]
    if group < 1 or task.batch_size % group:
        raise ValueError(f"the batch size must be a multiple of {group} (neighborhood x samples), not {task.batch_size}")
    return HTL(
        task.labels,
        num_anchors=task.batch_size // group,
        neighborhood_size=settings["neighborhood_size"],
        samples_per_class=settings["samples_per_class"],
        seed=task.seed,
        **margin_settings(settings),
    )


def margin_settings(settings: Settings) -> Settings:
    if "beta" not in settings:
        return {}
    margins = {name: settings[name] for name in ("num_levels", "beta", "initial_margin")}
    return {**margins, "distance": distance_of(settings)}


def build_triplet(task: Task, settings: Settings) -> Parts:
    return Parts(triplet_loss(settings), m_per_class(task, settings))


def build_triplet_semihard(task: Task, settings: Settings) -> Parts:
    loss = triplet_loss(settings)
    miner = miners.TripletMarginMiner(settings["margin"], "semihard", distance=loss.distance)
    return Parts(loss, m_per_class(task, settings), miner)


def build_contrastive(task: Task, settings: Settings) -> Parts:
    loss = losses.ContrastiveLoss(settings["pos_margin"], settings["neg_margin"])
    return Parts(loss, m_per_class(task, settings))


def build_multi_similarity(task: Task, settings: Settings) -> Parts:
    loss = losses.MultiSimilarityLoss(settings["alpha"], settings["beta"], settings["base"])
    return Parts(loss, m_per_class(task, settings), miners.MultiSimilarityMiner(settings["epsilon"]))


def build_ntxent(task: Task, settings: Settings) -> Parts:
    return Parts(losses.NTXentLoss(settings["temperature"]), m_per_class(task, settings))


def build_proxy_anchor(task: Task, settings: Settings) -> Parts:
    loss = losses.ProxyAnchorLoss(task.num_classes, task.embedding_size, settings["margin"], settings["alpha"])
    return Parts(loss, m_per_class(task, settings), loss_lr=settings["proxy_lr"])


def build_htl(task: Task, settings: Settings) -> Parts:
    parts = htl(task, settings)
    return Parts(parts.loss, parts.sampler, tree=parts.tree)


def build_htl_margin(task: Task, settings: Settings) -> Parts:
    margins = margin_settings(settings)
    tree = ClassTree(margins.pop("num_levels"))
    loss = HierarchicalTripletLoss(DynamicMarginMiner(tree, **margins))
    return Parts(loss, m_per_class(task, settings), tree=tree)


def build_htl_sampling(task: Task, settings: Settings) -> Parts:
    parts = htl(task, settings)
    return Parts(triplet_loss(settings), parts.sampler, tree=parts.tree)


METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Method(
            "triplet",
            "TripletMarginLoss on all triplets",
            build_triplet,
            {**PER_CLASS, "margin": 0.4, "distance": "plain"},
        ),
        Method(
            "triplet-semihard",
            "TripletMarginLoss on the semihard triplets of TripletMarginMiner",
            build_triplet_semihard,
            {**PER_CLASS, "margin": 0.4, "distance": "plain"},
        ),
        Method("contrastive", "ContrastiveLoss", build_contrastive, {**PER_CLASS, "pos_margin": 0.0, "neg_margin": 1.0}),
        Method(
            "multi-similarity",
            "MultiSimilarityLoss with its miner",
            build_multi_similarity,
            {**PER_CLASS, "alpha": 2.0, "beta": 50.0, "base": 0.8, "epsilon": 0.1},
        ),
        Method("ntxent", "NTXentLoss", build_ntxent, {**PER_CLASS, "temperature": 0.1}),
        Method(
            "proxy-anchor",
            "ProxyAnchorLoss",
            build_proxy_anchor,
            {**PER_CLASS, "margin": 0.1, "alpha": 4.0, "proxy_lr": 0.003},
        ),
        Method("htl", "dynamic margin and anchor-neighbour sampling", build_htl, {**NEIGHBORHOOD, **TREE}),
        Method("htl-margin", "dynamic margin with MPerClassSampler", build_htl_margin, {**PER_CLASS, **TREE}),
        Method(
            "htl-sampling",
            "TripletMarginLoss with anchor-neighbour sampling",
            build_htl_sampling,
            {**NEIGHBORHOOD, "margin": 0.4, "distance": "plain"},
        ),
    ]
}


@dataclass(frozen=True)
class Contender:
    """A method with its settings, and what the user asked for in them."""

    method: Method
    changes: Settings

    @property
    def settings(self) -> Settings:
        return {**self.method.defaults, **self.changes}

    def build(self, task: Task) -> Parts:
        """Loss, sampler and what else the method trains with."""
        return self.method.build(task, self.settings)

    @property
    def title(self) -> str:
        """`triplet`, or `triplet:margin=0.2` where a setting is not the default."""
        changes = ",".join(f"{name}={value}" for name, value in self.changes.items())
        return f"{self.method.name}:{changes}" if changes else self.method.name


def parse_contender(text: str) -> Contender:
    """`name` or `name:setting=value,setting=value`; a `ValueError` lists what there is."""
    name, _, assignments = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are: {', '.join(METHODS)}")
    method = METHODS[name]
    changes: Settings = {}
    for assignment in filter(None, assignments.split(",")):
        setting, _, value = assignment.partition("=")
        if setting not in method.defaults:
            raise ValueError(f"{name} has no setting {setting!r}; it has: {', '.join(method.defaults)}")
        kind = type(method.defaults[setting])
        try:
            changes[setting] = kind(value)
        except ValueError:
            raise ValueError(f"{setting} of {name} must be a {kind.__name__}, but it is {value!r}") from None
    return Contender(method, {name: value for name, value in changes.items() if value != method.defaults[name]})
