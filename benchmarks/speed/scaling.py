"""What the stages of a refresh cost in several processes, beside one of them that does all the work alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import TensorDataset

from pml_htl import ClassStatistics, ClassTree, TreeRefresh
from pml_htl.distributed import Ranks

from ..common import ranks
from ..common.printing import print_table
from ..outcomes import results, timings
from ..training.networks import conv_net
from .cases import Case, Contender, class_statistics

SAMPLES = 5
SIZES = {  # by stage
    "statistics": [{"N": 200_000, "C": 1_000, "D": 128}, {"N": 200_000, "C": 50_000, "D": 128}],
    "shared fit": [{"C": 10_000, "D": 128}, {"C": 30_000, "D": 128}],
    "refresh": [{"N": 7_500, "C": 555, "D": 256}],
}
NO_MEMORY = {"extra_mib": None, "process_mib": None}


def run(output: Path, console: Console) -> None:
    """Measures this many processes, one thread each, and adds them to those that are in the file."""
    together, number = Ranks(), ranks.number_of_processes()
    torch.set_num_threads(1)
    found = []
    for stage, sizes_of_stage in SIZES.items():
        for sizes in sizes_of_stage:
            work = {"statistics": _statistics, "shared fit": _fit, "refresh": _refresh}[stage](sizes)
            case = Case(stage, {**sizes, "ranks": number})
            for name, role, who in (("all ranks", "ours", together), ("one process", "peer", Ranks.alone())):
                seconds = _time(partial(work, who), takes_part=role == "ours" or together.rank == 0)
                contender = Contender(name, role, lambda: None)
                found.append(timings.measurement(case, contender, 1, seconds, NO_MEMORY))
    if together.rank:
        return
    document: dict[str, Any] = {"metadata": results.describe_session("cpu"), "measurements": found}
    if output.exists():
        kept = [entry for entry in results.load(output)["measurements"] if entry["sizes"]["ranks"] != number]
        document["measurements"] = sorted([*kept, *found], key=lambda entry: list(SIZES).index(entry["part"]))
    timings.validate(document)
    results.save(document, output)
    print_table(console, timings.rich_table(document))
    console.print(f"Written: {output}", highlight=False)


def _time(run: Callable[[], Any], *, takes_part: bool) -> list[float]:
    """Seconds from when all processes are ready until all are done, after a first run that does not count."""
    found = []
    for _ in range(1 + SAMPLES):
        ranks.wait_for_all()
        start = time.perf_counter()
        if takes_part:
            run()
        ranks.wait_for_all()
        found.append(time.perf_counter() - start)
    return found[1:]


def _statistics(sizes: dict[str, int]) -> Callable[[Ranks], Any]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(sizes["N"], sizes["D"], generator=generator)
    labels = torch.arange(sizes["N"]) % sizes["C"]

    def work(who: Ranks) -> None:
        own = ClassStatistics(torch.arange(sizes["C"]), sizes["D"])
        for batch in torch.arange(who.rank, sizes["N"], who.size).split(1024):
            own.update(embeddings[batch], labels[batch])
        if who.size > 1:
            own.all_reduce()

    return work


def _fit(sizes: dict[str, int]) -> Callable[[Ranks], Any]:
    statistics = class_statistics(Case("tree", sizes))
    return lambda who: ClassTree().fit(statistics, ranks=who)


def _refresh(sizes: dict[str, int]) -> Callable[[Ranks], Any]:
    """Of images as many and as large as the glyphs, by the network of the comparison."""
    network = conv_net(1, torch.Generator().manual_seed(0))
    images = torch.rand(sizes["N"], 1, 32, 32, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(sizes["N"]) % sizes["C"])
    alone = ranks.group_of_this_process()

    def work(who: Ranks) -> None:
        group = alone if who.size == 1 else None
        TreeRefresh(ClassTree(), data, group=group).refresh(network)

    return work
