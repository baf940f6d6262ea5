"""Trains every contender with every seed, and goes on where an interrupted run stopped."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..common.progress import progress_bar
from ..common.ranks import from_first, is_first
from ..data import Splits
from ..methods.contenders import Contender
from ..outcomes.plots import plot_class_tree, plot_curves
from ..outcomes.results import Results
from ..report.explorer import explorer_document, save_explorer
from ..training.parallel import workers
from ..training.resuming import checkpoint_of
from ..training.train import Outcome, Plan, train


def compare(
    contenders: list[Contender], seeds: list[int], plan: Plan, data: Splits, results: Results, jobs: int, console: Console
) -> None:
    """Adds the runs that are missing to `results`; plots and records of all runs go to the folder that it is in."""
    for contender in contenders:
        results.check_title(contender)
    # Each once, also if it was named twice or by settings that it has anyway: the first title counts.
    wanted: list[tuple[Contender, int]] = []
    for seed in seeds:
        for contender in contenders:
            if not any((seed, contender.method, contender.settings) == (s, c.method, c.settings) for c, s in wanted):
                wanted.append((contender, seed))
    missing = [(contender, seed) for contender, seed in wanted if not results.has(contender, seed)]
    missing = from_first(missing)  # on other machines there may be no file
    if len(missing) < len(wanted):
        console.print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {results.path} already.")

    if missing:
        train_missing(missing, plan, data, results, jobs, console)
    if is_first():
        plot_curves(results.document, results.path.parent / "accuracy.png")


def train_missing(
    missing: list[tuple[Contender, int]], plan: Plan, data: Splits, results: Results, jobs: int, console: Console
) -> None:
    with progress_bar(console) as progress, workers(data, jobs) as submit:
        bar = progress.add_task("trainings", total=len(missing))
        submitted = (
            (contender, seed, submit(train_one, contender, seed, plan, folder_of(contender, seed, results)))
            for contender, seed in missing
        )
        for contender, seed, future in submitted if jobs == 1 else list(submitted):
            outcome = future.result()
            if outcome is None:
                continue
            title = f"{contender.title}, seed {seed}"
            results.add(contender, seed, outcome)
            checkpoint_of(folder_of(contender, seed, results)).unlink(missing_ok=True)  # large, and of no more use
            picture = results.path.parent / "class_tree.png"
            if contender.method.name == "htl" and outcome.tree.is_fitted and not picture.exists():
                plot_class_tree(outcome.tree, data, title, picture)
                explored = explorer_document(outcome.tree, contender.margins_of(outcome.tree), data, title)
                save_explorer(explored, picture.with_suffix(".json"))
            progress.advance(bar)
            progress.console.print(f"{title}: test MAP@R {outcome.accuracies['test']['map_at_r']:.1%}", highlight=False)


def train_one(data: Splits, contender: Contender, seed: int, plan: Plan, folder: Path) -> Outcome | None:
    try:
        return train(contender, seed, plan, data, folder)
    except ValueError as error:  # such as embeddings of NaN
        raise ValueError(f"{contender.title}, seed {seed}: {error}") from error


def folder_of(contender: Contender, seed: int, results: Results) -> Path:
    return results.path.parent / "runs" / f"{contender.title}-seed{seed}".replace(":", "_")
