"""The contenders: one entry a method, each a loss with the miner and the sampler that belong to it.

All see the same network, optimiser, number of iterations and batch size. A method's settings are its own hyperparameters;
`triplet:margin=0.1,distance=squared` on the command line changes some of them. Any method can be given either sampler by
`sampling=per-class` or `sampling=neighbors`, whatever its default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import distances, losses, miners, samplers

from pml_htl import AnchorNeighborSampler, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss

from ..common.ranks import number_of_processes

Settings = dict[str, Any]  # numbers and words
BASELINE = "htl"  # what the others are compared with


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

    def build(self, task: Task, settings: Settings) -> Parts:
        """Loss, sampler and what else the method trains with."""
        tree = ClassTree(settings.get("num_levels", 16), linkage=settings.get("linkage", "single"))
        if settings["sampling"] == "neighbors":
            sampler: torch.utils.data.Sampler[Any] = neighbors(task, settings, tree)
        elif settings["sampling"] == "per-class":
            sampler = m_per_class(task, settings)
        else:
            raise ValueError(f"sampling must be per-class or neighbors, but it is {settings['sampling']!r}")
        loss, miner, learning_rate = self.learn(task, settings, tree)
        has_tree = settings["sampling"] == "neighbors" or isinstance(loss, HierarchicalTripletLoss)
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
    "learning_rate": 1e-3,
    "sampling": "per-class",
    "samples_per_class": 4,
    "neighborhood_size": 4,  # matters with sampling=neighbors alone
    "warmup_epochs": 1,  # before the first refresh; matters with a tree alone, for the sampling or for the margins
    "refresh_every": 1,  # epochs; likewise
}
NEIGHBORS: Settings = {"sampling": "neighbors"}
TRIPLET: Settings = {"margin": 0.4, "distance": "plain"}
CONTRASTIVE: Settings = {"pos_margin": 0.0, "neg_margin": 1.0}
NTXENT: Settings = {"temperature": 0.1}
PAPER: Settings = {
    "num_levels": 16,
    "linkage": "single",
    "beta": 0.1,
    "initial_margin": 0.2,
    "tree_weight": 1.0,
    "continuous": "no",
    "distance": "squared",
    "temperature": 0.0,  # that is, max(0, .) of each triplet
}
RECOMMENDED: Settings = {**PAPER, "distance": "plain", "temperature": 0.05}


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
    return AnchorNeighborSampler(
        task.labels,
        tree,
        num_anchors=task.batch_size // group,
        neighborhood_size=settings["neighborhood_size"],
        samples_per_class=settings["samples_per_class"],
        seed=task.seed,
    )


def distance_of(settings: Settings) -> distances.LpDistance:
    powers = {"plain": 1, "squared": 2}
    return distances.LpDistance(power=powers[one_of("distance", settings, *powers)])


def one_of(name: str, settings: Settings, *words: str) -> str:
    if settings[name] not in words:
        raise ValueError(f"{name} must be {' or '.join(words)}, but it is {settings[name]!r}")
    return settings[name]


def triplet(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    return Learning(losses.TripletMarginLoss(margin=settings["margin"], distance=distance_of(settings)))


def triplet_semihard(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    loss = triplet(task, settings, tree).loss
    return Learning(loss, miners.TripletMarginMiner(settings["margin"], "semihard", distance=loss.distance))


def contrastive(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    return Learning(losses.ContrastiveLoss(settings["pos_margin"], settings["neg_margin"]))


def multi_similarity(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    loss = losses.MultiSimilarityLoss(settings["alpha"], settings["beta"], settings["base"])
    return Learning(loss, miners.MultiSimilarityMiner(settings["epsilon"]))


def ntxent(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    return Learning(losses.NTXentLoss(settings["temperature"]))


def proxy_anchor(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    loss = losses.ProxyAnchorLoss(task.num_classes, task.embedding_size, settings["margin"], settings["alpha"])
    return Learning(loss, learning_rate=settings["proxy_lr"])


def margins(settings: Settings, tree: ClassTree) -> DynamicMarginMiner:
    return DynamicMarginMiner(
        tree,
        beta=settings["beta"],
        initial_margin=settings["initial_margin"],
        tree_weight=settings["tree_weight"],
        continuous=one_of("continuous", settings, "no", "yes") == "yes",
        distance=distance_of(settings),
    )


def htl(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    miner = margins(settings, tree)
    return Learning(HierarchicalTripletLoss(miner, temperature=settings["temperature"] or None))


METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Method("triplet", "TripletMarginLoss on all triplets", triplet, TRIPLET),
        Method(
            "triplet-semihard",
            "TripletMarginLoss on the semihard triplets of TripletMarginMiner",
            triplet_semihard,
            TRIPLET,
        ),
        Method("contrastive", "ContrastiveLoss", contrastive, CONTRASTIVE),
        Method(
            "multi-similarity",
            "MultiSimilarityLoss with its miner",
            multi_similarity,
            {"alpha": 2.0, "beta": 50.0, "base": 0.8, "epsilon": 0.1},
        ),
        Method("ntxent", "NTXentLoss", ntxent, NTXENT),
        Method("proxy-anchor", "ProxyAnchorLoss", proxy_anchor, {"margin": 0.1, "alpha": 4.0, "proxy_lr": 0.003}),
        Method(
            "htl",
            "dynamic margin and anchor-neighbour sampling, on plain distances, with a smooth maximum over the negatives",
            htl,
            {**NEIGHBORS, **RECOMMENDED},
        ),
        Method(
            "htl-streaming",
            "htl with a tree of the training batches, without a pass over the training set",
            htl,
            {**NEIGHBORS, **RECOMMENDED, "forget": 0.5},
        ),
        Method("htl-constant", "htl with a constant margin, beta", htl, {**NEIGHBORS, **RECOMMENDED, "tree_weight": 0.0}),
        Method("htl-margin", "htl with MPerClassSampler", htl, RECOMMENDED),
        Method("htl-paper", "htl as in the paper: squared distances, max(0, .)", htl, {**NEIGHBORS, **PAPER}),
        Method("htl-sampling", "TripletMarginLoss with anchor-neighbour sampling", triplet, {**NEIGHBORS, **TRIPLET}),
        Method(
            "contrastive-sampling",
            "ContrastiveLoss with anchor-neighbour sampling",
            contrastive,
            {**NEIGHBORS, **CONTRASTIVE},
        ),
        Method("ntxent-sampling", "NTXentLoss with anchor-neighbour sampling", ntxent, {**NEIGHBORS, **NTXENT}),
    ]
}


@dataclass(frozen=True)
class Contender:
    """A method with its settings as far as they are not its defaults, and a title for them."""

    method: Method
    changes: Settings
    label: str | None = None  # of tuned settings, which would be too many for a title

    @property
    def settings(self) -> Settings:
        return {**self.method.defaults, **self.changes}

    def build(self, task: Task) -> Parts:
        """Loss, sampler and what else the method trains with."""
        return self.method.build(task, self.settings)

    def margins_of(self, tree: ClassTree) -> DynamicMarginMiner:
        """The margins that a method of HTL makes of a tree."""
        return margins(self.settings, tree)

    @property
    def title(self) -> str:
        """`triplet`, or `triplet:margin=0.2` where a setting is not the default; or the label."""
        changes = ",".join(f"{name}={value}" for name, value in self.changes.items())
        return self.label or (f"{self.method.name}:{changes}" if changes else self.method.name)


def parse_contender(text: str, tuned: dict[str, Settings] | None = None) -> Contender:
    """`name` or `name:setting=value,setting=value`; a `ValueError` lists what there is.

    With `tuned`, settings by the names of methods, these take the place of the defaults, and `text` is the label.
    """
    name, _, assignments = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are: {', '.join(METHODS)}")
    if tuned is not None and name not in tuned:
        raise ValueError(f"{name} was not tuned; there are: {', '.join(tuned)}")
    method = METHODS[name]
    changes: Settings = {} if tuned is None else dict(tuned[name])
    for assignment in filter(None, assignments.split(",")):
        setting, _, value = assignment.partition("=")
        if setting not in method.defaults:
            raise ValueError(f"{name} has no setting {setting!r}; it has: {', '.join(method.defaults)}")
        kind = type(method.defaults[setting])
        try:
            changes[setting] = kind(value)
        except ValueError:
            raise ValueError(f"{setting} of {name} must be a {kind.__name__}, but it is {value!r}") from None
    # In the order of the defaults, whatever the order given, so that a contender has one title.
    changes = {name: changes[name] for name, value in method.defaults.items() if changes.get(name, value) != value}
    return Contender(method, changes, None if tuned is None else text)
