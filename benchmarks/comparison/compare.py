"""Trains every contender with every seed, goes on where an interrupted run stopped, and reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from ..common.progress import TrainingsProgress
from ..common.ranks import from_first, is_first
from ..data import Splits
from ..methods.contenders import Contender
from ..outcomes.plots import plot_class_tree, plot_curves
from ..outcomes.results import Results, summarize, title_of
from ..report.explorer import explorer_document
from ..report.retrievals import retrievals_document
from ..report.writing import save_compact, write_report
from ..training.parallel import tell, workers
from ..training.resuming import checkpoint_of
from ..training.train import Outcome, Plan, title_with_seed, train


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
        train_missing(missing, seeds[0], plan, data, results, jobs, console)
    if is_first():
        plot_curves(results.document, results.path.parent / "accuracy.png")


def report(data: Splits, results: Results, console: Console) -> Path:
    """Writes the report of a comparison beside its results file, and returns the page."""
    folder = results.path.parent
    with console.status("Writing the report ..."):
        embeddings, seeds = kept_embeddings(results)
        if embeddings:
            title = "seed " + " or ".join(map(str, sorted(seeds)))
            save_compact(retrievals_document(embeddings, data, title), folder / "retrievals.json")
        files = [results.path, *(folder / name for name in ("retrievals.json", "class_tree.json"))]
        write_report([file for file in files if file.exists()], folder / "report.html")
    return folder / "report.html"


def kept_embeddings(results: Results) -> tuple[dict[str, dict[str, np.ndarray]], set[int]]:
    """Those of the test, by title and split, of the first seed of each title that has them; and these seeds."""
    found: dict[str, dict[str, np.ndarray]] = {}
    seeds = set()
    for run in results.runs:
        title, files = title_of(run), sorted(folder_of(title_of(run), run["seed"], results).glob("*_embeddings.npy"))
        if title not in found and files:
            found[title] = {file.name.removesuffix("_embeddings.npy"): np.load(file) for file in files}
            seeds.add(run["seed"])
    return {title: found[title] for title in summarize(results.document).title if title in found}, seeds


def train_missing(
    missing: list[tuple[Contender, int]],
    looked_at: int,
    plan: Plan,
    data: Splits,
    results: Results,
    jobs: int,
    console: Console,
) -> None:
    """Trains them one after another, or some side by side; embeddings are kept of the seed that is looked at."""
    with TrainingsProgress(console, len(missing), plan.iterations) as progress, workers(data, jobs, progress.told) as submit:
        submitted = (
            (contender, seed, folder, submit(train_one, contender, seed, plan, folder, seed == looked_at))
            for contender, seed in missing
            for folder in [folder_of(contender.title, seed, results)]
        )
        for contender, seed, folder, future in submitted if jobs == 1 else list(submitted):
            outcome = future.result()
            if outcome is None:
                continue
            title = title_with_seed(contender, seed)
            results.add(contender, seed, outcome)
            checkpoint_of(folder).unlink(missing_ok=True)  # large, and of no more use
            picture = results.path.parent / "class_tree.png"
            if contender.method.name == "htl" and outcome.tree.is_fitted and not picture.exists():
                plot_class_tree(outcome.tree, data, title, picture)
                explored = explorer_document(outcome.tree, contender.margins_of(outcome.tree), data, title)
                save_compact(explored, picture.with_suffix(".json"))
            progress.ended(title, f"test MAP@R {outcome.accuracies['test']['map_at_r']:.1%}")


def train_one(data: Splits, contender: Contender, seed: int, plan: Plan, folder: Path, is_looked_at: bool) -> Outcome | None:
    try:
        return train(contender, seed, plan, data, folder, keep_embeddings=is_looked_at, tell=tell)
    except ValueError as error:  # such as embeddings of NaN
        raise ValueError(f"{title_with_seed(contender, seed)}: {error}") from error


def folder_of(title: str, seed: int, results: Results) -> Path:
    return results.path.parent / "runs" / f"{title}-seed{seed}".replace(":", "_")
