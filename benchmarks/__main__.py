"""The command line: `python -m benchmarks` runs the quick preset, `python -m benchmarks --help` shows everything."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

# PML's trainers and testers write a progress bar each; the comparison has one of its own.
os.environ.setdefault("TQDM_DISABLE", "1")

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

from . import results
from .compare import compare as run_comparison
from .data import DATA_SETS, load
from .methods import METHODS, parse_contender
from .speed.cases import PARTS
from .speed.run import run as run_speed
from .tables import markdown_table
from .training import Plan

QUICK_METHODS = [*METHODS, "htl:distance=plain"]  # the others' distances are plain, so HTL shows with plain ones too
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


@app.command()
def compare(
    methods: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:SETTING=VALUE,SETTING=VALUE; all, unless some are named.")
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option(help="Train each method once with each; 0 1 2, unless others are named.", min=0, max=2**32 - 1),
    ] = None,
    iterations: Annotated[int, typer.Option(help="Of each training.", min=1)] = 300,
    epoch_iterations: Annotated[int, typer.Option(help="Validate, and refresh the tree, after so many.", min=1)] = 50,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.", min=1)] = 128,
    embedding_size: Annotated[int, typer.Option(help="Length of an embedding.", min=1)] = 128,
    data: Annotated[str, typer.Option(help=f"One of: {', '.join(DATA_SETS)}.")] = "glyphs",
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, ...")] = "cpu",
    workers: Annotated[int, typer.Option(help="Loader processes; the built-in data need none.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="Folder for results; one that is there is continued.")] = Path("runs/compare"),
) -> None:
    """Train methods through PML's trainer, test them on unseen classes, and print, plot and save how they compare.

    Lists take values one after another: --methods htl triplet:margin=0.2 --seeds 0 1 2. A run that was interrupted goes
    on with what is missing when it is started again with the same --output.
    """
    with explained_errors():
        plan = Plan(iterations, epoch_iterations, batch_size, embedding_size, device, workers)
        with console.status(f"Making the data set {data} ..."):
            splits = load(data)
        contenders = [parse_contender(name) for name in methods or METHODS]
        for contender in contenders:  # what does not fit shows now, not after hours
            contender.build(plan.task(splits, seed=0))
        output.mkdir(parents=True, exist_ok=True)
        outcome = results.Results(output / "results.json", plan, splits.describe())
    run_comparison(contenders, seeds or [0, 1, 2], plan, splits, outcome, console)


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


@app.command("methods")
def list_methods() -> None:
    """List the methods and their settings."""
    for method in METHODS.values():
        settings = ",".join(f"{name}={value}" for name, value in method.defaults.items())
        console.print(f"[bold]{method.name}[/]: {method.description}\n  [dim]{settings}[/]", highlight=False)


@app.command()
def table(file: Annotated[Path, typer.Argument(help="A results file.")]) -> None:
    """Print a results file as a Markdown table."""
    with explained_errors():
        print(markdown_table(results.load(file)), end="")


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
    warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")  # PML's trainer
    logging.getLogger("PML").setLevel(logging.WARNING)
    app(spread_lists(sys.argv[1:] if arguments is None else arguments), prog_name="python -m benchmarks")


if __name__ == "__main__":
    main()
