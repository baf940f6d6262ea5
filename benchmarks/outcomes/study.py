"""The outcome of a tuning as a JSON file: every trial of every method, and the winners that `compare --tuned` trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..methods.contenders import find_method
from ..methods.method import Settings

if TYPE_CHECKING:
    import optuna

LATER = {"warmup_epochs"}  # settings that older trials lack: they had the defaults
TRIAL = {"settings": dict, "folds": list, "mean": float, "seconds": float}


def document_of(studies: list[optuna.Study], session: dict[str, Any]) -> dict[str, Any]:
    """The document of finished studies; `session` says where, when and by what they were made."""
    made_with = studies[0].user_attrs["made_with"]
    return {
        "metadata": {**session, **made_with},
        "studies": {
            study.study_name: [
                {
                    "settings": trial.user_attrs["settings"],
                    "folds": trial.user_attrs["folds"],
                    "mean": trial.value,
                    "seconds": trial.user_attrs["seconds"],
                    "error": trial.user_attrs["error"],
                }
                for trial in finished(study)
            ]
            for study in studies
        },
    }


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that have ended with an accuracy, in the order in which they began."""
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def winners(document: dict[str, Any]) -> dict[str, Settings]:
    """The settings of the best trial of each method; the first of equals.

    Raises:
        ValueError: it is another file, or some method had more trials than another.
    """
    return {method: trials[0] for method, trials in best(document, 1).items()}


def best(document: dict[str, Any], count: int) -> dict[str, list[Settings]]:
    """The settings of the best `count` trials of each method, best first; earlier ones of equals first.

    Raises:
        ValueError: it is another file, or some method had more trials than another, or all had fewer than `count`.
    """
    if "studies" not in document:
        raise ValueError("this is not the outcome of a tuning; `python -m benchmarks tune` writes one, study.json")
    counts = {method: len(trials) for method, trials in document["studies"].items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{method} {count}" for method, count in counts.items())
        raise ValueError(
            f"winners are compared after as many trials for each method, but there are {found}; go on with "
            f"`python -m benchmarks tune --methods {' '.join(counts)} --trials {max(counts.values())}`"
        )
    if max(counts.values()) < count:
        raise ValueError(f"the best {count} trials of each method are wanted, but each had {max(counts.values())}")
    return {
        method: [trial["settings"] for trial in sorted(trials, key=lambda trial: -trial["mean"])[:count]]
        for method, trials in document["studies"].items()
    }


def validate(document: dict[str, Any]) -> None:
    """Raises a `ValueError` that names what is not as it should be."""
    missing = [name for name in ("commit", "versions", "plan", "data", "folds") if name not in document["metadata"]]
    if missing:
        raise ValueError(f"the metadata lack {', '.join(missing)}")
    for method, trials in document["studies"].items():
        defaults = find_method(method).defaults
        if not trials:
            raise ValueError(f"{method} has no trials")
        for number, trial in enumerate(trials):
            where = f"trial {number} of {method}"
            for name, wanted in TRIAL.items():
                if not isinstance(trial.get(name), wanted):
                    raise ValueError(f"{where}: {name} should be a {wanted.__name__}, but it is {trial.get(name)!r}")
            if len(trial["folds"]) != document["metadata"]["folds"] or not all(0 <= value <= 1 for value in trial["folds"]):
                raise ValueError(
                    f"{where}: there should be {document['metadata']['folds']} accuracies in 0..1, not {trial['folds']}"
                )
            unknown = (trial["settings"].keys() ^ defaults.keys()) - LATER
            if unknown:
                raise ValueError(f"{where}: settings that only it or only {method} has: {', '.join(sorted(unknown))}")


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """Method, trials, MAP@R of the defaults and of the best trial in per cent, and what the best has changed."""
    table = []
    for method, trials in document["studies"].items():
        first = max(trials, key=lambda trial: trial["mean"])
        defaults = find_method(method).defaults
        untuned = [percent(trial["mean"]) for trial in trials if trial["settings"] == defaults]  # none in some finals
        changes = [f"{name}={brief(value)}" for name, value in first["settings"].items() if value != defaults[name]]
        row = (
            method,
            str(len(trials)),
            *(untuned or ["-"])[:1],
            percent(first["mean"]),
            ", ".join(changes) or "the defaults",
        )
        table.append((first["mean"], row))
    return [row for _, row in sorted(table, key=lambda entry: -entry[0])]


def brief(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


COLUMNS = ("method", "trials", "defaults", "best", "settings of the best")


def caption(document: dict[str, Any]) -> str:
    """What the numbers are of."""
    metadata = document["metadata"]
    plan = metadata["plan"]
    return (
        f"{metadata['data']['name']}, {plan['iterations']} iterations at batch size {plan['batch_size']}; "
        f"mean MAP@R over {metadata['folds']} class-disjoint folds of the training classes, in per cent"
    )
