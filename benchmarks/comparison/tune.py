"""Fair tuning: for every method a search over its own hyperparameters, with the same number of trials on the same folds.

The objective is the mean validation MAP@R over class-disjoint folds of the training classes; validation and test classes
are not looked at. The studies are in one SQLite file. Trials of a method follow one another, each drawn by a generator
seeded with the number of those before it, so that a search that was killed goes on as if nothing had happened; different
methods run side by side.

A search in short trainings can be followed by a final of its best trials at full length, which tell more.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import optuna
from rich.console import Console

from ..common.progress import progress_bar
from ..data import Splits
from ..data.splits import fold
from ..methods.contenders import METHODS, Contender, find_method
from ..methods.method import Settings
from ..methods.spaces import batches_of, space_of, suggest
from ..outcomes.study import finished
from ..training.parallel import Submit, workers
from ..training.train import Plan, train

NUM_FOLDS = 4  # parts of the training classes, of which some are validated on
STARTUP_TRIALS = 4  # the defaults and three at random, before the search learns from them
FAILED = 0.0  # what a trial is worth whose training diverged


def tune(
    first: dict[str, list[Settings]],
    trials: int,
    folds: int,
    plan: Plan,
    data: Splits,
    database: Path,
    jobs: int,
    console: Console,
) -> list[optuna.Study]:
    """Searches until every method has its trials; returns all studies of the database, also of methods not in `first`.

    `first` has the settings that each method begins with: its defaults, or the best of an earlier search.

    Raises:
        ValueError: a batch does not fit the data, or the database is of another plan, of other data or of other folds.
    """
    check_batches(list(first), folds, plan, data)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
    description = describe(plan, data, folds)
    check_made_alike(storage, description)
    studies = [open_study(storage, method, description) for method in first]
    missing = sum(max(0, trials - len(finished(study))) for study in studies)
    with progress_bar(console) as progress, workers(data, jobs) as submit:
        bar = progress.add_task("trials", total=missing)
        waiting = [study for study in studies if len(finished(study)) < trials]
        running: dict[Future[Any], tuple[optuna.Study, optuna.Trial]] = {}
        while waiting or running:
            while waiting and len(running) < jobs:
                study = waiting.pop(0)
                trial, future = start_trial(study, first[study.study_name], plan, folds, submit)
                running[future] = study, trial
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                study, trial = running.pop(future)
                end_trial(study, trial, future.result())
                progress.advance(bar)
                done = finished(study)
                progress.console.print(
                    f"{study.study_name}, trial {len(done)} of {trials}: {done[-1].value:.1%} (best {study.best_value:.1%})",
                    highlight=False,
                )
                if len(done) < trials:
                    waiting.append(study)
    everything = {study.study_name: study for study in check_made_alike(storage, description)}
    order = [*(method for method in METHODS if method in everything), *(name for name in everything if name not in METHODS)]
    return [everything[method] for method in order if finished(everything[method])]


def check_batches(methods: list[str], folds: int, plan: Plan, data: Splits) -> None:
    """Raises a `ValueError` for a batch that some trial may want and that cannot be: the trial would be worth nothing."""
    parts = [fold(data, number, of=NUM_FOLDS) for number in range(folds)]
    for method in methods:
        for batch in batches_of(method):
            settings = {**find_method(method).defaults, **batch}
            for part in parts:
                try:
                    find_method(method).build(plan.task(part, seed=0), settings)
                except ValueError as error:
                    found = f"{method} is searched with {batch}, but {error}; choose another --batch-size"
                    raise ValueError(found) from error


def check_made_alike(storage: optuna.storages.BaseStorage, description: dict[str, Any]) -> list[optuna.Study]:
    """All studies; a `ValueError` if one was made in another way, since what was tuned so is not to be compared."""
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    for study in studies:
        made_with = study.user_attrs.get("made_with", description)
        if made_with != description:
            raise ValueError(
                f"the study of {study.study_name} was made with {made_with}, but now it is {description}; choose another "
                "--output"
            )
    return studies


def open_study(storage: optuna.storages.BaseStorage, method: str, description: dict[str, Any]) -> optuna.Study:
    """The study of a method, to go on with."""
    study = optuna.create_study(storage=storage, study_name=method, direction="maximize", load_if_exists=True)
    study.set_user_attr("made_with", description)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # killed: drawn again, the same
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def describe(plan: Plan, data: Splits, folds: int) -> dict[str, Any]:
    """What all trials of a study share."""
    return {"plan": plan.comparable(), "data": data.describe(), "folds": folds}


def start_trial(
    study: optuna.Study, first: list[Settings], plan: Plan, folds: int, submit: Submit
) -> tuple[optuna.Trial, Future[Any]]:
    method, number = study.study_name, len(finished(study))
    if number < len(first) and not study.get_trials(states=[optuna.trial.TrialState.WAITING]):
        study.enqueue_trial({name: first[number][name] for name in space_of(method)})
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=STARTUP_TRIALS, multivariate=True, seed=zlib.crc32(f"{method} {number}".encode())
    )
    trial = study.ask()
    settings = suggest(trial, method)
    trial.set_user_attr("settings", settings)
    return trial, submit(try_settings, method, settings, plan, folds)


def try_settings(data: Splits, method: str, settings: Settings, plan: Plan, folds: int) -> dict[str, Any]:
    """Trains on all but one fold, and validates on that, for some of the folds."""
    start = time.perf_counter()
    contender = Contender(find_method(method), settings)
    values, error = [], None
    for number in range(folds):
        with tempfile.TemporaryDirectory(prefix="pml-htl-tune-") as folder:
            try:
                outcome = train(contender, number, plan, fold(data, number, of=NUM_FOLDS), Path(folder), test=False)
                assert outcome is not None  # `tune` takes no torchrun, so that this process is the first
                values.append(outcome.accuracies["validation"]["map_at_r"])
            except ValueError as failure:  # a training that diverged, such as one with a tree of NaN
                values, error = [*values, FAILED], str(failure)
    return {"folds": values, "error": error, "seconds": round(time.perf_counter() - start, 1)}


def end_trial(study: optuna.Study, trial: optuna.Trial, outcome: dict[str, Any]) -> None:
    for name, value in outcome.items():
        trial.set_user_attr(name, value)
    study.tell(trial, statistics.fmean(outcome["folds"]))
