"""The hyperparameters that `tune` searches, for each method its own; all methods get the same number of trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from .contenders import find_method
from .method import NEIGHBORS, Settings

if TYPE_CHECKING:
    import optuna

Dimension = Callable[["optuna.Trial", str], Any]
Space = dict[str, Dimension]  # by the names of settings


def between(low: float, high: float) -> Dimension:
    """Uniform."""
    return lambda trial, name: trial.suggest_float(name, low, high)


def log(low: float, high: float) -> Dimension:
    """Uniform in the logarithm."""
    return lambda trial, name: trial.suggest_float(name, low, high, log=True)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[float | str, ...]

    def __call__(self, trial: optuna.Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)


def choice(*values: float | str) -> Choice:
    """One of some values."""
    return Choice(values)


COMMON: Space = {"learning_rate": log(3e-4, 1e-2), "samples_per_class": choice(2, 4, 8)}
# Only where the sampler has neighbourhoods.
NEIGHBORHOOD: Space = {"neighborhood_size": choice(2, 4, 8)}
TRIPLET: Space = {"margin": log(0.03, 1.0), "distance": choice("plain", "squared")}
MARGIN: Space = {"beta": between(0.0, 0.4)}
LEVELS: Space = {"num_levels": choice(8, 16, 32, 64)}
SOFT: Space = {"temperature": log(0.01, 0.3)}
TREE: Space = {**MARGIN, **LEVELS, **SOFT}
CONTRASTIVE: Space = {"pos_margin": between(0.0, 0.5), "neg_margin": between(0.4, 1.4)}
MULTI_SIMILARITY: Space = {
    "alpha": log(0.5, 10.0),
    "beta": log(10.0, 100.0),
    "base": between(0.2, 1.0),
    "epsilon": between(0.0, 0.3),
}
PROXIES: Space = {"loss_lr": log(1e-3, 0.3)}


def both(name: str, space: Space) -> dict[str, Space]:
    """The same space with either sampler."""
    return {name: space, f"{name}-sampling": space}


OWN: dict[str, Space] = {
    "triplet": TRIPLET,
    "triplet-semihard": TRIPLET,
    "contrastive": CONTRASTIVE,
    "multi-similarity": MULTI_SIMILARITY,
    "ntxent": {"temperature": log(0.02, 0.5)},
    **both("proxy-anchor", {"margin": between(0.0, 0.4), "alpha": log(4.0, 64.0), "proxy_lr": log(1e-3, 0.3)}),
    "htl": TREE,
    "htl-streaming": {**TREE, "forget": between(0.3, 0.95)},
    "htl-constant": {**MARGIN, **SOFT},
    "htl-margin": TREE,
    "htl-paper": {**MARGIN, **LEVELS},
    "triplet-sampling": TRIPLET,
    "contrastive-sampling": CONTRASTIVE,
    "ntxent-sampling": {"temperature": log(0.02, 0.5)},
    "multi-similarity-sampling": MULTI_SIMILARITY,
    **both("supcon", {"temperature": log(0.02, 0.5)}),
    **both("circle", {"m": between(0.1, 0.6), "gamma": log(16.0, 512.0)}),
    **both(
        "soft-triple",
        {
            "la": log(5.0, 80.0),
            "gamma": log(0.03, 0.5),
            "margin": log(0.003, 0.3),
            "centers_per_class": choice(1, 2, 5, 10),
            **PROXIES,
        },
    ),
    **both("arcface", {"margin": between(5.0, 40.0), "scale": log(8.0, 64.0), **PROXIES}),
    **both("normalized-softmax", {"temperature": log(0.02, 0.5), **PROXIES}),
}


def suggest(trial: optuna.Trial, method: str) -> Settings:
    """The settings of a trial: what is searched for this method, drawn, and its defaults for the rest."""
    return {**find_method(method).defaults, **{name: draw(trial, name) for name, draw in space_of(method).items()}}


def space_of(method: str) -> Space:
    """The dimensions that are searched for a method, by the names of its settings."""
    own_sampling = find_method(method).defaults["sampling"]
    return {**COMMON, **(NEIGHBORHOOD if own_sampling == NEIGHBORS["sampling"] else {}), **OWN[method]}


def batches_of(method: str) -> Iterator[Settings]:
    """Every way in which a trial may fill its batches, so that one that does not fit shows before the search."""
    space = space_of(method)
    of_batch = {name: space[name] for name in ("samples_per_class", "neighborhood_size") if name in space}
    for values in product(*(one.values for one in of_batch.values() if isinstance(one, Choice))):
        yield dict(zip(of_batch, values, strict=True))
