"""The command that looks at data through a network: `confusable`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from pml_htl import ClassTree, TreeRefresh

from ..common.printing import print_table
from ..data import IN_FILES
from ..outcomes.tables import narrow_table
from ..training.networks import NETWORKS, make_network
from ..training.train import Plan
from ..training.trained import network_of_run, plan_of_run
from .app import app, console, explained_errors
from .train import loaded

HEADS = ("classes", "ratio", "distance", "level")


@app.command()
def confusable(
    run: Annotated[
        Path | None, typer.Option(help="A training of `compare`, such as runs/compare/runs/htl-seed0: its network and data.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Other data, as for `compare`.")] = None,
    network: Annotated[str | None, typer.Option(help=f"Instead of --run, one of: {', '.join(NETWORKS)}.")] = None,
    weights: Annotated[str, typer.Option(help="Of --network: pretrained, or a file of a state dict.")] = "pretrained",
    split: Annotated[str, typer.Option(help="Classes to look at: train, val or test.")] = "train",
    count: Annotated[int, typer.Option(help="Pairs.", min=1)] = 50,
    image_size: Annotated[int, typer.Option(help="Crops of data sets in files.", min=8)] = 224,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    workers: Annotated[int, typer.Option(help="Loader processes.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="The page.")] = Path("runs/confusable.html"),
) -> None:
    """Show the pairs of classes that a network tells apart least: as a table, and as a page with their images.

    Such pairs are often duplicates, variants of one thing, or one class under two names.
    """
    with explained_errors():
        if (run is None) == (network is None):
            raise ValueError("name a training of `compare` by --run, or a network by --network (and --weights)")
        if split not in ("train", "val", "test"):
            raise ValueError(f"split must be train, val or test, but it is {split!r}")
        try:
            from ..report.pairs import pairs_page
        except ImportError as error:
            raise ValueError(f'confusable needs {error.name}: pip install ".[benchmarks]"') from error
        plan, known = (Plan(), None) if run is None else plan_of_run(run)
        name = data or known
        if name is None:
            raise ValueError("a network needs data to look at: --data folder:PATH, say")
        plan = replace(
            plan, device=device, weights="random", image_size=image_size if name.partition(":")[0] in IN_FILES else None
        )
        splits = loaded(name, plan)
        images = getattr(splits, split)
        if run is not None:
            model = network_of_run(run, plan, images.channels)
        else:
            model = make_network(network or "", images.channels, 0, weights)[0].eval()
        tree = ClassTree()
        with console.status(f"Embedding {len(images):,} images ..."), torch.no_grad():
            refresh = TreeRefresh(tree, images.evaluation(), labels=images.labels, num_workers=workers)
            refresh.refresh(model.to(device))
        table = tree.confusable(count)
        title = f"{name}, {split}, by {run or network}"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(pairs_page(table, images, splits.class_names, title), encoding="utf-8")
    names = splits.class_names
    rows: list[tuple[str, ...]] = [
        (
            f"{names[row['label_a']]} and {names[row['label_b']]}",
            f"{row['ratio']:.2f}",
            f"{row['distance']:.3f}",
            str(row["level"]),
        )
        for row in table
    ]
    print_table(console, narrow_table(HEADS, rows, title))
    console.print(f"The page with their images is {output}")
