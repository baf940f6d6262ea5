"""The contenders: one entry a method, each a loss with the miner and the sampler that belong to it.

All see the same network, optimiser, number of iterations and batch size. A method's settings are its own hyperparameters;
`triplet:margin=0.1,distance=squared` on the command line changes some of them. Any method can be given either sampler by
`sampling=per-class` or `sampling=neighbors`, whatever its default. Beside these, any class of a loss is one (by_name.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss

from .by_name import method_of_class
from .method import NEIGHBORS, Learning, Method, Parts, Settings, Task

BASELINE = "htl"  # what the others are compared with

TRIPLET: Settings = {"margin": 0.4, "distance": "plain"}
CONTRASTIVE: Settings = {"pos_margin": 0.0, "neg_margin": 1.0}
MULTI_SIMILARITY: Settings = {"alpha": 2.0, "beta": 50.0, "base": 0.8, "epsilon": 0.1}
NTXENT: Settings = {"temperature": 0.1}
PROXY_ANCHOR: Settings = {"margin": 0.1, "alpha": 4.0, "proxy_lr": 0.003}
PAPER: Settings = {
    "num_levels": 16,
    "linkage": "single",
    "beta": 0.1,
    "initial_margin": 0.2,
    "margins": "tree",  # or "constant", which is beta
    "distance": "squared",
    "temperature": 0.0,  # that is, max(0, .) of each triplet
}
RECOMMENDED: Settings = {**PAPER, "distance": "plain", "temperature": 0.05}


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


class NTXent(torch.nn.Module):
    """PML's `NTXentLoss`, values and gradients, in an eightieth of its time (at batch size 128) and without its lists.

    It is the smooth form of ours, on squared distances and without a margin, over its temperature.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.scale = 2 * temperature  # squared distances are 2 minus twice the similarity
        without_margin = DynamicMarginMiner(ClassTree(), beta=0.0, dynamic=False)
        self.smooth = HierarchicalTripletLoss(without_margin, temperature=self.scale)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, indices_tuple: None = None) -> torch.Tensor:
        """As PML's, of all pairs."""
        return self.smooth(embeddings, labels) / self.scale


def ntxent(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    return Learning(NTXent(settings["temperature"]))


def proxy_anchor(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    loss = losses.ProxyAnchorLoss(task.num_classes, task.embedding_size, settings["margin"], settings["alpha"])
    return Learning(loss, learning_rate=settings["proxy_lr"])


def margins(settings: Settings, tree: ClassTree) -> DynamicMarginMiner:
    return DynamicMarginMiner(
        tree,
        beta=settings["beta"],
        initial_margin=settings["initial_margin"],
        dynamic=one_of("margins", settings, "tree", "constant") == "tree",
        distance=distance_of(settings),
    )


def htl(task: Task, settings: Settings, tree: ClassTree) -> Learning:
    miner = margins(settings, tree)
    return Learning(HierarchicalTripletLoss(miner, temperature=settings["temperature"] or None))


def of_class(name: str, loss: str, changes: Settings) -> list[Method]:
    """A loss by its class with other defaults, once with each sampler."""
    method = method_of_class(loss, changes)
    assert method is not None
    defaults = {**method.own_defaults, **changes}
    return [
        replace(method, name=name, description=loss, own_defaults=defaults),
        replace(
            method,
            name=f"{name}-sampling",
            description=f"{loss} with anchor-neighbour sampling",
            own_defaults={**NEIGHBORS, **defaults},
        ),
    ]


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
            MULTI_SIMILARITY,
        ),
        Method("ntxent", "NTXentLoss, computed as the smooth form of ours, which is the same", ntxent, NTXENT),
        Method("proxy-anchor", "ProxyAnchorLoss", proxy_anchor, PROXY_ANCHOR),
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
        Method("htl-constant", "htl with a constant margin, beta", htl, {**NEIGHBORS, **RECOMMENDED, "margins": "constant"}),
        Method("htl-margin", "htl with MPerClassSampler", htl, RECOMMENDED),
        Method("htl-paper", "htl as in the paper: squared distances, max(0, .)", htl, {**NEIGHBORS, **PAPER}),
        Method("triplet-sampling", "TripletMarginLoss with anchor-neighbour sampling", triplet, {**NEIGHBORS, **TRIPLET}),
        Method(
            "contrastive-sampling",
            "ContrastiveLoss with anchor-neighbour sampling",
            contrastive,
            {**NEIGHBORS, **CONTRASTIVE},
        ),
        Method("ntxent-sampling", "NTXentLoss with anchor-neighbour sampling", ntxent, {**NEIGHBORS, **NTXENT}),
        Method(
            "multi-similarity-sampling",
            "MultiSimilarityLoss with its miner and anchor-neighbour sampling",
            multi_similarity,
            {**NEIGHBORS, **MULTI_SIMILARITY},
        ),
        Method(
            "proxy-anchor-sampling",
            "ProxyAnchorLoss with anchor-neighbour sampling",
            proxy_anchor,
            {**NEIGHBORS, **PROXY_ANCHOR},
        ),
        *of_class("supcon", "SupConLoss", {}),
        *of_class("circle", "CircleLoss", {}),
        *of_class("soft-triple", "SoftTripleLoss", {}),
        *of_class("arcface", "ArcFaceLoss", {}),
        *of_class("normalized-softmax", "NormalizedSoftmaxLoss", {}),
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


# NAME or NAME:SETTINGS, where NAME may be MODULE:CLASS.
CONTENDER = re.compile(r"(?P<name>[^:=]+(:\w+(?![^:]*=))?)(:(?P<assignments>.*))?")


def find_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method of a name: one of `METHODS`, or a class of a loss with what the `settings` say of its parts.

    Raises:
        ValueError: there is none; says what there is.
    """
    if name in METHODS:
        return METHODS[name]
    method = method_of_class(name, settings or {})
    if method is None:
        raise ValueError(
            f"there is no method {name!r}; there are: {', '.join(METHODS)}; and any loss of pytorch_metric_learning.losses "
            "by the name of its class, or one of your own as module:Class"
        )
    return method


def parse_contender(text: str, tuned: dict[str, Settings] | None = None) -> Contender:
    """`name` or `name:setting=value,setting=value`; a `ValueError` lists what there is.

    With `tuned`, settings by the names of methods, these take the place of the defaults, and `text` is the label.
    """
    match = CONTENDER.fullmatch(text)
    name, assignments = (text, "") if match is None else (match["name"], match["assignments"] or "")
    given = dict(assignment.partition("=")[::2] for assignment in filter(None, assignments.split(",")))
    method = find_method(name, given)
    if tuned is not None and name not in tuned:
        raise ValueError(f"{name} was not tuned; there are: {', '.join(tuned)}")
    changes: Settings = {} if tuned is None else dict(tuned[name])
    for setting, value in given.items():
        if setting not in method.defaults:
            raise ValueError(f"{name} has no setting {setting!r}; it has: {', '.join(method.defaults)}")
        changes[setting] = method.parse(setting, value)
    # In the order of the defaults, whatever the order given, so that a contender has one title.
    changes = {name: changes[name] for name, value in method.defaults.items() if changes.get(name, value) != value}
    return Contender(method, changes, None if tuned is None else text)
