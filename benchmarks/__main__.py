"""The command line: `python -m benchmarks` runs the quick preset, `python -m benchmarks --help` shows everything."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before PML is imported; see parallel.quiet

try:
    import matplotlib  # noqa: F401
    import pandas  # noqa: F401
    import rich  # noqa: F401
    import typer
except ImportError as error:
    sys.exit(f'The benchmarks need {error.name}: pip install ".[benchmarks,with-hooks-cpu]"')
try:
    import faiss  # noqa: F401
    import record_keeper  # noqa: F401
    import tensorboard  # noqa: F401
except ImportError as error:
    sys.exit(f'PML\'s hooks need {error.name}: pip install ".[with-hooks-cpu]" (or with-hooks, for faiss-gpu)')

import torch
from rich.console import Console

from .common.ranks import is_first, number_of_processes, process_group
from .comparison.compare import compare as run_comparison
from .data import IN_FILES, IN_MEMORY, Splits, load
from .methods.ablations import ABLATIONS
from .methods.contenders import METHODS, Contender, Settings, parse_contender
from .outcomes import results
from .outcomes.study import document_of as outcome_of_tuning
from .outcomes.study import winners as winners_of
from .outcomes.tables import markdown_ablations, markdown_table, rich_ablation_table, rich_table
from .speed.cases import PARTS
from .speed.run import run as run_speed
from .training.networks import NETWORKS, make_network
from .training.parallel import quiet
from .training.train import Plan

QUICK_METHODS = [
    *("triplet", "triplet-semihard", "contrastive", "multi-similarity", "ntxent", "proxy-anchor"),
    *("htl", "htl-paper", "htl-streaming", "htl-margin", "htl-sampling"),
]
QUICK_ITERATIONS = 200  # all of them end within ten minutes on two cores
app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Compares Hierarchical Triplet Loss with the losses of pytorch-metric-learning. Without a command: the quick "
    f"preset, all methods with one seed and {QUICK_ITERATIONS} iterations, in less than ten minutes on two cores.",
)
console = Console()


@app.callback(invoke_without_command=True)
def quick(context: typer.Context) -> None:
    """Without a command: the quick preset."""
    if context.invoked_subcommand is None:
        compare(methods=QUICK_METHODS, seeds=[0], iterations=QUICK_ITERATIONS, output=Path("runs/quick"))


Methods = Annotated[list[str] | None, typer.Option(help="NAME or NAME:SETTING=VALUE,...; all, unless some are named.")]
Seeds = Annotated[list[int] | None, typer.Option(help="Train each method once with each.", min=0, max=2**32 - 1)]
Iterations = Annotated[int, typer.Option(help="Of each training.", min=1)]
EpochIterations = Annotated[int, typer.Option(help="Validate, and refresh the tree, after so many.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Samples in a batch.", min=1)]
EmbeddingSize = Annotated[int, typer.Option(help="Length of an embedding.", min=1)]
DataName = Annotated[
    str,
    typer.Option(help=f"{', '.join(IN_MEMORY)}; or NAME:PATH of {', '.join(IN_FILES)} (default data/NAME)."),
]
ImageSize = Annotated[int, typer.Option(help="Crops of data sets in files.", min=8)]
Network = Annotated[str, typer.Option(help=f"One of: {', '.join(NETWORKS)}.")]
Weights = Annotated[str, typer.Option(help="random, pretrained (on ImageNet, by timm's hub), or a file of a state dict.")]
FreezeBatchNorm = Annotated[bool, typer.Option("--freeze-batch-norm", help="Leave the network's batch norm as it is.")]
Device = Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, ...")]
LoaderProcesses = Annotated[int, typer.Option(help="Loader processes; the built-in data need none.", min=0)]
Precision = Annotated[str, typer.Option(help="Of the network: fp32, or bf16 (autocast).")]
Jobs = Annotated[int, typer.Option(help="Trainings at a time, each with its share of the cores.", min=1)]
Output = Annotated[Path, typer.Option(help="Folder for results; one that is there is continued.")]
Tuned = Annotated[bool, typer.Option("--tuned", help="Settings, unless a method names its own, are the best of --study.")]
StudyFile = Annotated[Path, typer.Option(help="The outcome of `tune` that --tuned takes settings from.")]
STUDY = Path(__file__).parent / "results" / "study.json"


@app.command()
def compare(
    methods: Methods = None,
    seeds: Seeds = None,
    tuned: Tuned = False,
    study: StudyFile = STUDY,
    iterations: Iterations = 300,
    epoch_iterations: EpochIterations = 50,
    batch_size: BatchSize = 128,
    embedding_size: EmbeddingSize = 128,
    data: DataName = "glyphs",
    image_size: ImageSize = 224,
    network: Network = "conv_net",
    weights: Weights = "random",
    freeze_batch_norm: FreezeBatchNorm = False,
    device: Device = "cpu",
    workers: LoaderProcesses = 0,
    precision: Precision = "fp32",
    jobs: Jobs = 1,
    output: Output = Path("runs/compare"),
) -> None:
    """Train methods through PML's trainer, test them on unseen classes, and print, plot and save how they compare.

    Lists take values one after another: --methods htl triplet:margin=0.2 --seeds 0 1 2. Seeds are 0 1 2 unless others are
    named, and 0 1 2 3 4 with --tuned. A run that was interrupted goes on with what is missing when it is started again with
    the same --output.
    """
    with explained_errors():
        plan = Plan(
            iterations, epoch_iterations, batch_size, embedding_size, device, workers, precision,
            network, weights, freeze_batch_norm, image_size if in_files(data) else None,
        )  # fmt: skip
        winners = tuned_settings(study) if tuned else None
        contenders = [parse_contender(name, winners) for name in methods or winners or METHODS]
        document = run(contenders, seeds or list(range(5 if tuned else 3)), plan, data, jobs, output)
    if document is None:
        return
    console.print(rich_table(document))
    console.print(f"Results, plots and records are in {output}/: " + ", ".join(sorted(p.name for p in output.iterdir())))


@app.command()
def ablate(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help=f"Some of: {', '.join(ABLATIONS)}.")],
    seeds: Seeds = None,
    tuned: Annotated[
        bool, typer.Option("--tuned", help="Settings, but for those in question, are those of --study.")
    ] = False,
    study: StudyFile = STUDY,
    iterations: Iterations = 300,
    epoch_iterations: EpochIterations = 50,
    embedding_size: EmbeddingSize = 128,
    data: DataName = "glyphs",
    image_size: ImageSize = 224,
    network: Network = "conv_net",
    weights: Weights = "random",
    freeze_batch_norm: FreezeBatchNorm = False,
    device: Device = "cpu",
    workers: LoaderProcesses = 0,
    precision: Precision = "fp32",
    jobs: Jobs = 1,
    output: Output = Path("runs/ablate"),
) -> None:
    """Answer questions about HTL, with three seeds (0 1 2): what its halves carry, or what a setting is worth.

    Questions share their trainings: all are in one results file in --output, and those of other batch sizes in a folder for
    each.
    """
    with explained_errors():
        unknown = [name for name in names if name not in ABLATIONS]
        if unknown:
            raise ValueError(f"there is no ablation {', '.join(unknown)}; there are: {', '.join(ABLATIONS)}")
        winners = tuned_settings(study) if tuned else None
        for name in names:
            contenders = [parse_contender(text, winners) for text in ABLATIONS[name].contenders]
            console.print(f"[bold]{name}[/]: {ABLATIONS[name].question}")
            for changes in ABLATIONS[name].plans:
                plan = Plan(
                    iterations, epoch_iterations, 128, embedding_size, device, workers, precision,
                    network, weights, freeze_batch_norm, image_size if in_files(data) else None,
                )  # fmt: skip
                folder = output.joinpath(*(f"{setting}-{value}" for setting, value in changes.items()))
                document = run(contenders, seeds or [0, 1, 2], replace(plan, **changes), data, jobs, folder)
                if document is not None:
                    console.print(rich_ablation_table(name, document))


@app.command()
def tune(
    methods: Annotated[list[str] | None, typer.Option(help="All, unless some are named.")] = None,
    trials: Annotated[int, typer.Option(help="For each method; the first is its defaults.", min=1)] = 8,
    folds: Annotated[int, typer.Option(help="Of four, to validate on, one after another.", min=1, max=4)] = 2,
    iterations: Iterations = 150,
    epoch_iterations: EpochIterations = 50,
    batch_size: BatchSize = 128,
    embedding_size: EmbeddingSize = 128,
    data: DataName = "glyphs",
    image_size: ImageSize = 224,
    network: Network = "conv_net",
    weights: Weights = "random",
    freeze_batch_norm: FreezeBatchNorm = False,
    device: Device = "cpu",
    workers: LoaderProcesses = 0,
    precision: Precision = "fp32",
    jobs: Jobs = 1,
    output: Output = Path("runs/tune"),
) -> None:
    """Search the settings of every method with optuna: as many trials for each, on folds of the training classes.

    The search is in study.db of --output. It can be stopped at any time and goes on when started again, also with more
    --trials or other --methods. The --batch-size is a multiple of 64, so that all settings fit.
    study.json, the outcome of all of them, is what `compare --tuned --study` takes, once every method has as many trials.
    Hours on two cores for all methods.
    """
    with explained_errors():
        if number_of_processes() > 1:
            raise ValueError("tune takes no torchrun: it has processes of its own, see --jobs")
        try:
            from .comparison import tune as tuning
        except ImportError as error:
            raise ValueError(f'tune needs {error.name}: pip install ".[benchmarks]"') from error
        plan = Plan(
            iterations, epoch_iterations, batch_size, embedding_size, device, workers, precision,
            network, weights, freeze_batch_norm, image_size if in_files(data) else None,
        )  # fmt: skip
        names = [parse_contender(name).method.name for name in methods or METHODS]
        splits = loaded(data, plan)
        output.mkdir(parents=True, exist_ok=True)
        studies = tuning.tune(names, trials, folds, plan, splits, output / "study.db", jobs, console)
        document = outcome_of_tuning(studies, results.describe_session(device))
        results.save(document, output / "study.json")
    console.print(rich_table(document))
    console.print(f"The study is in {output}/study.db, its outcome in {output}/study.json")


def run(
    contenders: list[Contender], seeds: list[int], plan: Plan, data: str, jobs: int, output: Path
) -> dict[str, Any] | None:
    """Trains, and returns the results file (None in all processes but the first); what does not fit shows now."""
    if jobs > 1 and number_of_processes() > 1:
        raise ValueError("--jobs runs several trainings at a time, and torchrun several processes of one: use one of them")
    splits = loaded(data, plan)
    for contender in contenders:
        contender.build(plan.task(splits, seed=0))
    output.mkdir(parents=True, exist_ok=True)
    outcome = results.Results(output / "results.json", plan, splits.describe())
    run_comparison(contenders, seeds, plan, splits, outcome, jobs, console)
    return outcome.document if is_first() else None


def in_files(data: str) -> bool:
    return data.partition(":")[0] in IN_FILES


def loaded(data: str, plan: Plan) -> Splits:
    """The data set; a network that is not to be had shows now as well."""
    with console.status(f"Making the data set {data} ..."):
        splits = load(data, plan.image_size or 0)
        make_network(plan.network, splits.train.channels, 0, plan.weights)
    return splits


def tuned_settings(file: Path) -> dict[str, Settings]:
    """The winners of a tuning."""
    if not file.exists():
        raise ValueError(f"there is no {file}; `python -m benchmarks tune` makes one, for --study")
    return winners_of(results.load(file))


@app.command()
def speed(
    parts: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(PARTS)}; all, unless some are named.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: one, and all cores for the tree.", min=1)] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    large: Annotated[bool, typer.Option(help="Also trees of 300,000 classes, and on a GPU of a million.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for speed.json and speed.png.")] = Path("runs/speed"),
) -> None:
    """Time loss, miner, sampler and tree beside PML's and SciPy's, and beside the matrix products they cannot do without.

    All contenders of a case take turns in one process; memory is measured in another one for each. Takes about ten minutes
    on two cores.
    """
    with explained_errors():
        unknown = sorted(set(parts or []).difference(PARTS))
        if unknown:
            raise ValueError(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
        try:
            torch.zeros(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"there is no device {device} here: {str(error).splitlines()[0]}") from error
        output.mkdir(parents=True, exist_ok=True)
    run_speed(parts or list(PARTS), threads, torch.get_num_threads(), device, large, output, console)


@app.command()
def scaling(
    output: Annotated[Path, typer.Option(help="Results file; those of other numbers of processes stay in it.")] = Path(
        "runs/scaling.json"
    ),
) -> None:
    """Time the stages of a refresh in several processes, beside one that does all the work alone.

    torchrun --nproc-per-node=2 -m benchmarks scaling
    """
    with explained_errors():
        from .speed import scaling as stages

        stages.run(output, console)


@app.command("methods")
def list_methods() -> None:
    """List the methods and their settings."""
    for method in METHODS.values():
        settings = ",".join(f"{name}={value}" for name, value in method.defaults.items())
        console.print(f"[bold]{method.name}[/]: {method.description}\n  [dim]{settings}[/]", highlight=False)


@app.command()
def table(
    files: Annotated[list[Path], typer.Argument(help="A results file, or several with --ablations.")],
    ablations: Annotated[bool, typer.Option("--ablations", help="By question, of the files that `ablate` wrote.")] = False,
) -> None:
    """Print a results file as a Markdown table."""
    with explained_errors():
        documents = [results.load(file) for file in files]
        if ablations:
            print(markdown_ablations(documents), end="")
            return
        for document in documents:
            print(markdown_table(document), end="")


@app.command("report")
def make_report(
    files: Annotated[list[Path], typer.Argument(help="Results files, and class_tree.json of a comparison.")],
    output: Annotated[Path, typer.Option(help="The page, and the same as Markdown beside it.")] = Path("runs/report.html"),
) -> None:
    """Make one page of results files that opens offline: ranking, curves, cost, and an explorer of a trained class tree."""
    with explained_errors():
        try:
            from .report import page
        except ImportError as error:
            raise ValueError(f'report needs {error.name}: pip install ".[benchmarks]"') from error
        documents, trees = page.read(files)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page.html(documents, trees), encoding="utf-8")
        output.with_suffix(".md").write_text(page.markdown(documents), encoding="utf-8")
    console.print(f"Written: {output}, {output.with_suffix('.md')}", highlight=False)


@contextmanager
def explained_errors() -> Iterator[None]:
    """What the user can mend ends in a line, not in a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def spread_lists(arguments: list[str]) -> list[str]:
    """`--seeds 0 1 2` as `--seeds 0 --seeds 1 --seeds 2`, the way the command-line library reads lists."""
    spread: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.partition("=")[0]
            option = name if name in ("--methods", "--seeds", "--parts") else None
            spread.append(argument)
        elif option and spread[-1] != option:
            spread += [option, argument]
        else:
            spread.append(argument)
    return spread


def main(arguments: list[str] | None = None) -> None:
    quiet()
    with process_group():
        console.quiet = not is_first()
        app(spread_lists(sys.argv[1:] if arguments is None else arguments), prog_name="python -m benchmarks")


if __name__ == "__main__":
    main()
