"""Any loss by the name of its class: of pytorch-metric-learning, or module:Class of one's own.

`CircleLoss:m=0.4,gamma=80`, `MultiSimilarityLoss:miner=MultiSimilarityMiner,miner.epsilon=0.2`,
`ContrastiveLoss:distance=CosineSimilarity,pos_margin=1,neg_margin=0,memory=4096`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from ast import literal_eval
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners

from pml_htl import ClassTree
from pml_htl.losses import CrossBatchMemory

from .method import Learning, Method, Settings, Task

NONE = "none"
# Arguments that follow from the data and the network.
FILLED = {
    "num_classes": lambda task: task.num_classes,
    "embedding_size": lambda task: task.embedding_size,
    "descriptors_dim": lambda task: task.embedding_size,
}
# Weights of regularizers, which cannot be written, and what a distance knows of itself.
LEFT_OUT = ("embedding_reg_weight", "weight_reg_weight", "is_inverted")
# Of what has none: RankedListLoss as in its paper, HistogramLoss as in PML's documentation.
DEFAULTS: dict[str, Settings] = {"RankedListLoss": {"margin": 0.4, "Tn": 10}, "HistogramLoss": {"n_bins": 100}}
BASE = "it is a base class of losses"
REFUSED = {
    **dict.fromkeys(
        ("BaseMetricLossFunction", "GenericPairLoss", "EmbeddingRegularizerMixin", "WeightRegularizerMixin"), BASE
    ),
    "BaseLossWrapper": "it wraps another loss",
    "CrossBatchMemory": "it wraps another loss: give that one memory=SIZE",
    "MultipleLosses": "it joins other losses, which have no names here",
    "SelfSupervisedLoss": "it compares two views of the same images, and these methods have labels",
    "DynamicSoftMarginLoss": "it keeps the graph of a batch in its histogram, so that it trains for one step only (PML 2.9)",
    "ManifoldLoss": "it takes no labels of samples",
    "VICRegLoss": "it compares two views of the same images, and these methods have labels",
}


def method_of_class(name: str, settings: Mapping[str, Any]) -> Method | None:
    """The method of a loss by the name of its class, with the settings of the miner and the distance that are chosen.

    None if the name is neither module:Class nor that of a class of PML.

    Raises:
        ValueError: the class needs more than embeddings and labels, or there is no such module, class, miner or distance.
    """
    cls = _loss_class(name)
    if cls is None:
        return None
    parts = {}
    for part, module in (("miner", miners), ("distance", distances)):
        chosen = str(settings.get(part, NONE))
        parts[part] = None if chosen == NONE else _class_in(module, chosen, part)
    own: Settings = {**_arguments(cls), **DEFAULTS.get(name, {})}
    own |= {part: NONE for part in parts}
    own |= {f"{part}.{key}": value for part, chosen in parts.items() if chosen for key, value in _arguments(chosen).items()}
    own |= {"memory": 0, "loss_lr": 0.01}
    return ClassMethod(
        name, f"{name} of {cls.__module__.partition('.')[0]}", _Learn(cls, parts["miner"], parts["distance"]), own
    )


@dataclass(frozen=True)
class ClassMethod(Method):
    """A method whose settings are arguments of classes, of any type that can be written."""

    def parse(self, setting: str, text: str) -> Any:
        """A Python literal, or else a word; a number where the default is one."""
        default = self.defaults[setting]
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        is_number = isinstance(value, (int, float))
        if isinstance(default, (int, float)) and not is_number:
            raise ValueError(f"{setting} of {self.name} must be a number (or True or False), but it is {text!r}")
        if setting in COUNTS and not isinstance(value, int):
            raise ValueError(f"{setting} of {self.name} must be an integer, but it is {text!r}")
        return value


COUNTS = ("samples_per_class", "neighborhood_size", "warmup_epochs", "refresh_every", "memory")


@dataclass(frozen=True)
class _Learn:
    """Makes the loss, with its distance, its miner and a memory around it."""

    loss: type
    miner: type | None
    distance: type | None

    def __call__(self, task: Task, settings: Settings, tree: ClassTree) -> Learning:
        distance = None if self.distance is None else self.distance(**_changed(self.distance, settings, "distance."))
        shared = {} if distance is None else {"distance": distance}
        own = {name: settings[name] for name in _arguments(self.loss) if settings[name] is not None}
        own |= {name: settings[name] for name in DEFAULTS.get(self.loss.__name__, {})}
        filled = {name: of_task(task) for name, of_task in FILLED.items() if name in _parameters(self.loss)}
        try:
            loss = self.loss(**{**filled, **own, **shared})
            miner = None if self.miner is None else self.miner(**{**_changed(self.miner, settings, "miner."), **shared})
            if settings["memory"]:
                loss, miner = CrossBatchMemory(loss, task.embedding_size, int(settings["memory"]), miner), None
        except Exception as error:  # PML asserts, and raises bare exceptions
            raise ValueError(f"{self.loss.__name__}: {error or type(error).__name__}") from error
        has_parameters = any(True for _ in loss.parameters())
        return Learning(loss, miner, settings["loss_lr"] if has_parameters else None)


def _changed(cls: type, settings: Settings, prefix: str) -> Settings:
    """Arguments that are not the defaults: some classes set one themselves, and refuse it."""
    defaults = _arguments(cls)
    return {name: settings[prefix + name] for name, default in defaults.items() if settings[prefix + name] != default}


def _loss_class(name: str) -> type | None:
    module_name, _, class_name = name.rpartition(":")
    if module_name:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(f"there is no module {module_name!r} to import: {error}") from error
        cls = getattr(module, class_name, None)
        if not (inspect.isclass(cls) and issubclass(cls, torch.nn.Module)):
            raise ValueError(f"there is no loss {class_name!r}, a torch module, in {module_name}")
        return cls
    if name in REFUSED:
        raise ValueError(f"{name} is no method of its own: {REFUSED[name]}")
    if not inspect.isclass(getattr(losses, name, None)):
        close = difflib.get_close_matches(name, [name for name, cls in vars(losses).items() if inspect.isclass(cls)])
        if name[:1].isupper():  # meant as a class
            raise ValueError(
                f"there is no loss {name!r} in pytorch_metric_learning.losses; near are: {', '.join(close) or 'none'}"
            )
        return None
    return getattr(losses, name)


def _class_in(module: ModuleType, name: str, part: str) -> type:
    cls = getattr(module, name, None)
    if not inspect.isclass(cls):
        known = [name for name, cls in vars(module).items() if inspect.isclass(cls) and not name.startswith("Base")]
        near = difflib.get_close_matches(name, known) or known
        raise ValueError(f"there is no {part} {name!r} in {module.__name__}; there are: {', '.join(near)}")
    return cls


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Those of its constructor and, as far as that passes on what it does not know, of the classes above it."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is torch.nn.Module or base is object:
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _arguments(cls: type) -> Settings:
    """The arguments that can be written as a number or a word, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in _parameters(cls).items()
        if name not in (*FILLED, *LEFT_OUT) and isinstance(parameter.default, (int, float, str))
    }
