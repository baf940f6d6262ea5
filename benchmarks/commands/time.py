"""The commands that time: `speed` and `scaling`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..speed import run as timing
from ..speed.cases import PARTS
from .app import app, console, explained_errors


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
    timing.run(parts or list(PARTS), threads, torch.get_num_threads(), device, large, output, console)


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
        from ..speed import scaling as stages

        stages.run(output, console)
