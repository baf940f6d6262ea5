"""The commands that train: the quick preset, `compare`, `ablate` and `tune`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common.printing import print_table
from ..common.ranks import is_first, number_of_processes, wait_for_all
from ..comparison import compare as comparing
from ..data import Splits, capped, fewer_classes, load, with_noise
from ..methods.ablations import ABLATIONS
from ..methods.contenders import METHODS, Contender, find_method, parse_contender
from ..methods.method import Settings
from ..outcomes import results
from ..outcomes.study import best, winners
from ..outcomes.study import document_of as outcome_of_tuning
from ..outcomes.tables import rich_ablation_table, rich_table
from ..training.networks import make_network
from ..training.train import Plan
from .app import app, console, explained_errors
from .options import TrainingOptions, with_training_options

QUICK_METHODS = ["triplet", "triplet-sampling", "multi-similarity", "ntxent", "ntxent-sampling", "htl", "htl-paper"]
QUICK_ITERATIONS = 1000  # all of them end within ten minutes on two cores
STUDY = Path(__file__).parents[1] / "results" / "study.json"
Methods = Annotated[list[str] | None, typer.Option(help="NAME or NAME:SETTING=VALUE,...; all, unless some are named.")]
Seeds = Annotated[list[int] | None, typer.Option(help="Train each method once with each.", min=0, max=2**32 - 1)]
Tuned = Annotated[bool, typer.Option("--tuned", help="Settings that are not named here are the best of --study.")]
StudyFile = Annotated[Path, typer.Option(help="The outcome of `tune` that --tuned takes settings from.")]


@app.callback(
    invoke_without_command=True,
    help="Compares Hierarchical Triplet Loss with the losses of pytorch-metric-learning. Without a command: the quick "
    f"preset, seven methods with one seed and {QUICK_ITERATIONS} iterations, in less than ten minutes on two cores.",
)
def quick(context: typer.Context) -> None:
    """Without a command: the quick preset."""
    if context.invoked_subcommand is None:
        jobs = min(os.cpu_count() or 1, len(QUICK_METHODS))
        compare(methods=QUICK_METHODS, seeds=[0], iterations=QUICK_ITERATIONS, jobs=jobs, output=Path("runs/quick"))


@app.command()
@with_training_options(output=Path("runs/compare"))
def compare(
    options: TrainingOptions,
    methods: Methods = None,
    seeds: Seeds = None,
    tuned: Tuned = False,
    study: StudyFile = STUDY,
    report: Annotated[bool, typer.Option(help="End with the page of results, retrievals and a map.")] = True,
) -> None:
    """Train methods through PML's trainer, test them on unseen classes, and print, plot and save how they compare.

    Lists take values one after another: --methods htl triplet:margin=0.2 --seeds 0 1 2. Seeds are 0 1 2 unless others are
    named, and 0 1 2 3 4 with --tuned. A run that was interrupted goes on with what is missing when it is started again with
    the same --output.
    """
    with explained_errors():
        settings = tuned_settings(study) if tuned else None
        contenders = [parse_contender(name, settings) for name in methods or settings or METHODS]
        document = run(
            contenders, seeds or list(range(5 if tuned else 3)), options, options.plan(), options.output, report=report
        )
    if document is None:
        return
    print_table(console, rich_table(document))
    files = ", ".join(sorted(path.name for path in options.output.iterdir()))
    console.print(f"Results, plots and records are in {options.output}/: {files}")
    if report:
        console.print(f"Open {(options.output / 'report.html').resolve().as_uri()}", highlight=False, soft_wrap=True)


@app.command()
@with_training_options(without=("batch_size",), output=Path("runs/ablate"))
def ablate(
    options: TrainingOptions,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help=f"Some of: {', '.join(ABLATIONS)}.")],
    seeds: Seeds = None,
    tuned: Tuned = False,
    study: StudyFile = STUDY,
) -> None:
    """Answer questions about HTL, with three seeds (0 1 2): what its halves carry, or what a setting is worth.

    Questions share their trainings: all are in one results file in --output, and those of other batch sizes in a folder for
    each.
    """
    with explained_errors():
        unknown = [name for name in names if name not in ABLATIONS]
        if unknown:
            raise ValueError(f"there is no ablation {', '.join(unknown)}; there are: {', '.join(ABLATIONS)}")
        settings = tuned_settings(study) if tuned else None
        for name in names:
            contenders = [parse_contender(text, settings) for text in ABLATIONS[name].contenders]
            console.print(f"[bold]{name}[/]: {ABLATIONS[name].question}")
            for changes in ABLATIONS[name].plans:
                folder = options.output.joinpath(*(f"{setting}-{value}" for setting, value in changes.items()))
                plan = replace(options.plan(), **changes)
                document = run(contenders, seeds or [0, 1, 2], options, plan, folder)
                if document is not None:
                    print_table(console, rich_ablation_table(name, document))


@app.command()
@with_training_options(iterations=500, output=Path("runs/tune"))
def tune(
    options: TrainingOptions,
    methods: Annotated[list[str] | None, typer.Option(help="All, unless some are named.")] = None,
    trials: Annotated[int, typer.Option(help="For each method; the first is its defaults.", min=1)] = 12,
    folds: Annotated[int, typer.Option(help="Of four, to validate on, one after another.", min=1, max=4)] = 1,
    finalists: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The outcome of another search, whose best to train again.")
    ] = None,
) -> None:
    """Search the settings of every method with optuna: as many trials for each, on folds of the training classes.

    The search is in study.db of --output. It can be stopped at any time and goes on when started again, also with more
    --trials or other --methods. The --batch-size is a multiple of 64, so that all settings fit.
    study.json, the outcome of all of them, is what `compare --tuned --study` takes, once every method has as many trials.
    Hours on two cores for all methods.

    With --finalists runs/tune/study.json --trials 3 --iterations 2000 there is no search: the best three trials of each
    method of that file are trained again, at a length that tells more.
    """
    output = options.output
    with explained_errors():
        if number_of_processes() > 1:
            raise ValueError("tune takes no torchrun: it has processes of its own, see --jobs")
        try:
            from ..comparison import tune as tuning
        except ImportError as error:
            raise ValueError(f'tune needs {error.name}: pip install ".[benchmarks]"') from error
        plan = options.plan()
        earlier = {} if finalists is None else best(results.load(finalists), trials)
        names = [parse_contender(name).method.name for name in methods or earlier or METHODS]
        if finalists is not None and not earlier.keys() >= {*names}:
            raise ValueError(f"{finalists} has {', '.join(earlier)}, but not {', '.join({*names} - earlier.keys())}")
        first = {name: earlier.get(name, [find_method(name).defaults]) for name in names}
        splits = loaded(options.data, plan)
        output.mkdir(parents=True, exist_ok=True)
        studies = tuning.tune(first, trials, folds, plan, splits, output / "study.db", options.jobs, console)
        document = outcome_of_tuning(studies, results.describe_session(options.device))
        results.save(document, output / "study.json")
    print_table(console, rich_table(document))
    console.print(f"The study is in {output}/study.db, its outcome in {output}/study.json")


def run(
    contenders: list[Contender],
    seeds: list[int],
    options: TrainingOptions,
    plan: Plan,
    output: Path,
    *,
    report: bool = False,
) -> dict[str, Any] | None:
    """Trains, and returns the results file (None in all processes but the first); what does not fit shows now."""
    if options.jobs > 1 and number_of_processes() > 1:
        raise ValueError("--jobs runs several trainings at a time, and torchrun several processes of one: use one of them")
    splits = loaded(options.data, plan)
    for contender in contenders:
        contender.build(plan.task(splits, seed=0))
    output.mkdir(parents=True, exist_ok=True)
    outcome = results.Results(output / "results.json", plan, splits.describe())
    comparing.compare(contenders, seeds, plan, splits, outcome, options.jobs, console)
    if report and is_first():
        comparing.report(splits, outcome, console)
    wait_for_all()  # torchrun ends the first process if another has ended with an error meanwhile
    return outcome.document if is_first() else None


def loaded(data: str, plan: Plan) -> Splits:
    """The data set; a network that is not to be had shows now as well."""
    with console.status(f"Making the data set {data} ..."):
        splits = load(data, plan.image_size or 0)
        if plan.classes is not None:
            splits = fewer_classes(splits, plan.classes)
        if plan.samples_per_class is not None:
            splits = capped(splits, plan.samples_per_class)
        if plan.split_classes or plan.wrong_labels:
            splits = with_noise(splits, plan.split_classes, plan.wrong_labels)
        make_network(plan.network, splits.train.channels, 0, plan.weights)
    return splits


def tuned_settings(file: Path) -> dict[str, Settings]:
    """The winners of a tuning."""
    if not file.exists():
        raise ValueError(f"there is no {file}; `python -m benchmarks tune` makes one, for --study")
    return winners(results.load(file))
