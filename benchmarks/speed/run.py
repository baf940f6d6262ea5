"""Runs the cases, writes the results file after each, and shows the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..common.printing import print_table
from ..outcomes import results, timings
from .cases import cases
from .measure import peak_memory, time_in_turns


def run(
    parts: list[str], threads: int | None, all_cores: int, device: str, large: bool, output: Path, console: Console
) -> None:
    """`threads` None: one, and all cores for the tree. Files: `speed.json`, `speed.png`."""
    document: dict[str, Any] = {"metadata": {}, "measurements": []}
    todo = cases(parts, large, device)
    for number, case in enumerate(todo, start=1):
        used = (all_cores if case.part == "tree" else 1) if threads is None else threads
        title = timings.title(case.part, case.sizes, case.classes)
        console.print(f"[{number}/{len(todo)}] {title}", highlight=False, markup=False)
        torch.set_num_threads(used)
        contenders = case.contenders(device)
        seconds = time_in_turns(contenders)
        for contender in contenders:
            memory = peak_memory(case, contender.name, device, used)
            document["measurements"].append(timings.measurement(case, contender, used, seconds[contender.name], memory))
        del contenders
        document["metadata"] = results.describe_session(device)
        timings.validate(document)
        results.save(document, output / "speed.json")
    print_table(console, timings.rich_table(document))
    timings.plot(document, output / "speed.png")
    console.print(f"Written: {output / 'speed.json'}, {output / 'speed.png'}", highlight=False)
