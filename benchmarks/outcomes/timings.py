"""The results file of the speed benchmark, its table and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

ROLES = ("ours", "alone", "peer", "floor")
COLUMNS = ("case", "time", "peer / ours", "ours / floor", "memory")
UNITS = {
    "loss": "forward + backward",
    "smooth loss": "forward + backward",
    "miner": "a call",
    "sampler": "a batch",
    "tree": "a fit",
    "full refresh": "all of it",
    "epoch": "an iteration with its share of the refresh",
    "statistics": "updates with all embeddings, and their sum over the ranks",
    "shared fit": "a fit",
    "refresh": "a whole refresh",
}
BESIDE = {
    "loss": "peer: PML's TripletMarginLoss, floors: Gram matrix with backward, by autograd and in one product less",
    "smooth loss": "squared distances and no margin, peer: PML's NTXentLoss, which is the same loss",
    "miner": "peer: PML's TripletMarginMiner",
    "sampler": "peer: PML's MPerClassSampler",
    "epoch": "peer: PML's TripletMarginLoss with the same sampler and no refresh",
    "full refresh": "floors: the forward passes of the network alone, with 64 or 256 images at a time",
    "tree": "peers: single linkage of SciPy and scikit-learn, floor: one product of all class means",
    **dict.fromkeys(("statistics", "shared fit", "refresh"), "peer: one of the processes does all the work alone"),
}
DRAWN = ("loss", "miner", "sampler", "tree")  # the others are of one size
MEASUREMENT = {"part": str, "sizes": dict, "classes": str, "name": str, "role": str, "threads": int, "seconds": dict}
BYTES_OF_FLOAT = 4


def measurement(case: Any, contender: Any, threads: int, seconds: list[float], memory: dict[str, Any]) -> dict[str, Any]:
    """An entry of the results file; `seconds` of one unit of work."""
    low, median, high = (float(np.percentile(seconds, share)) for share in (25, 50, 75))
    return {
        "part": case.part,
        "sizes": case.sizes,
        "classes": case.classes,
        "name": contender.name,
        "role": contender.role,
        "threads": threads,
        "seconds": {"median": median, "q1": low, "q3": high, "samples": len(seconds)},
        **memory,
    }


def validate(document: dict[str, Any]) -> None:
    """Raises a `ValueError` that names what is not as it should be."""
    if not isinstance(document["measurements"], list) or not document["measurements"]:
        raise ValueError("measurements should be a list that is not empty")
    missing = [name for name in ("commit", "versions", "device", "date", "command") if not document["metadata"].get(name)]
    if missing:
        raise ValueError(f"the metadata lack {', '.join(missing)}")
    seen = set()
    for number, entry in enumerate(document["measurements"]):
        where = f"measurements[{number}]"
        for name, wanted in MEASUREMENT.items():
            if not isinstance(entry.get(name), wanted):
                raise ValueError(f"{where}: {name} should be a {wanted.__name__}, but it is {entry.get(name)!r}")
        if entry["role"] not in ROLES or entry["part"] not in UNITS:
            raise ValueError(f"{where}: there is no role {entry['role']!r} or no part {entry['part']!r}")
        seconds = entry["seconds"]
        if not 0 < seconds.get("q1", 0) <= seconds.get("median", 0) <= seconds.get("q3", 0) or seconds.get("samples", 0) < 1:
            raise ValueError(f"{where}: seconds should be quartiles above 0 of some samples, but they are {seconds}")
        for name in ("extra_mib", "process_mib"):
            if name not in entry or not (entry[name] is None or entry[name] >= 0):
                raise ValueError(f"{where}: {name} should be a number of MiB, or none, but it is {entry.get(name)!r}")
        key = _case_of(entry), entry["name"]
        if key in seen:
            raise ValueError(f"{where}: {entry['name']} stands twice in {key[0]}")
        seen.add(key)


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table: one row for each of ours, with its peers and floor."""
    found: list[tuple[str, ...]] = []
    for entry in document["measurements"]:
        if entry["role"] not in ("ours", "alone"):
            continue
        others = [other for other in document["measurements"] if _case_of(other) == _case_of(entry)]
        peers = [other for other in others if other["role"] == "peer" and entry["role"] == "ours"]
        floors = [other for other in others if other["role"] == "floor"]
        faster = [f"{_ratio(peer, entry):.3g}" + _named(peer, peers) for peer in peers]
        slower = [f"{_ratio(entry, floor):.2f}" + _named(floor, floors) for floor in floors]
        _, _, variant = entry["name"].partition(", ")
        what = title(entry["part"], entry["sizes"], entry["classes"]) + f"; {variant}" * bool(variant)
        seconds = entry["seconds"]
        found.append((what, _durations(seconds), ", ".join(faster) or "-", ", ".join(slower) or "-", _memory(entry)))
    return found


def _named(entry: dict[str, Any], among: list[dict[str, Any]]) -> str:
    return f" ({entry['name'].split()[0]})" if len(among) > 1 else ""


def title(part: str, sizes: dict[str, int], classes: str) -> str:
    """What a case is called."""
    text = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    return f"{part}: {text}" + ("" if classes == "balanced" else f", {classes}")


def caption(document: dict[str, Any]) -> str:
    """What the numbers are of."""
    device = document["metadata"]["device"]
    parts = {entry["part"]: entry["threads"] for entry in document["measurements"]}
    what = ", ".join(
        f"{part} ({UNITS[part]}, {threads} thread{'s' * (threads > 1)}, {BESIDE[part]})" for part, threads in parts.items()
    )
    return (
        f"{what}; {_device(device)}; median (quartiles) of samples that took turns; memory: peak above what was there before"
    )


def _device(device: dict[str, Any]) -> str:
    """Older files do not tell the processor, nor which of torch's kernels ran."""
    processor = f" {device['processor']} with {device['kernels']} kernels" if "processor" in device else ""
    return f"device {device['name']}{processor}, {device['cores']} cores"


def rich_table(document: dict[str, Any]) -> Table:
    table = Table(title=caption(document), title_justify="left", title_style="italic", header_style="bold")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number else "left")
    for cells in rows(document):
        table.add_row(*cells)
    return table


def markdown_table(document: dict[str, Any]) -> str:
    lines = [COLUMNS, ("---",) + ("---:",) * (len(COLUMNS) - 1), *rows(document)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{caption(document)}\n"


def plot(document: dict[str, Any], path: Path) -> None:
    """Cost over B for loss and miner, over C for sampler and tree; double logarithmic, balanced classes, one t or D each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [part for part in DRAWN if any(entry["part"] == part for entry in document["measurements"])]
    if not parts:
        return
    num_columns = min(2, len(parts))
    num_rows = -(-len(parts) // num_columns)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(4.8 * num_columns, 4.8 * num_rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(parts) :]:
        ax.remove()
    for ax, part in zip(axes.flat, parts, strict=False):
        over = "B" if part in ("loss", "miner") else "C"
        lines: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
        for entry in document["measurements"]:
            sizes = entry["sizes"]
            usual = sizes.get("t", 4) in (4, 5) and sizes.get("D") in (None, 128 if part == "tree" else 512)
            if entry["part"] == part and entry["classes"] == "balanced" and usual:
                lines.setdefault((entry["name"], entry["role"]), []).append((sizes[over], entry["seconds"]))
        for (name, role), points in lines.items():
            points.sort(key=lambda point: point[0])
            at = [size for size, _ in points]
            style = {"ours": ("-", 2.4), "alone": ("-", 2.4), "peer": ("--", 1.4), "floor": (":", 1.8)}[role]
            (line,) = ax.plot(
                at, [s["median"] for _, s in points], linestyle=style[0], linewidth=style[1], marker="o", markersize=3.5,
                label=name, color={"autograd's Gram matrix": "0.55"}.get(name, "0.2") if role == "floor" else None,
            )  # fmt: skip
            ax.fill_between(
                at, [s["q1"] for _, s in points], [s["q3"] for _, s in points], color=line.get_color(), alpha=0.2
            )
        ax.set(xscale="log", yscale="log", xlabel=over, ylabel=f"seconds, {UNITS[part]}", title=part)
        ticks = sorted({size for points in lines.values() for size, _ in points})
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=60)
        ax.minorticks_off()
        ax.grid(alpha=0.3, which="both", linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        if lines:
            ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.24))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _case_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["part"], tuple(entry["sizes"].items()), entry["classes"]


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    return one["seconds"]["median"] / other["seconds"]["median"]


def _durations(seconds: dict[str, float]) -> str:
    """Median and quartiles in the unit of the median."""
    unit, scale = next(
        ((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e-3)) if seconds["median"] >= scale), ("us", 1e-6)
    )
    low, median, high = (f"{seconds[name] / scale:.3g}" for name in ("q1", "median", "q3"))
    return f"{median} {unit}, one run" if seconds["samples"] == 1 else f"{median} ({low}-{high}) {unit}"


def _memory(entry: dict[str, Any]) -> str:
    extra = entry["extra_mib"]
    if extra is None:
        return "-"
    text = f"{extra:.0f} MiB"
    if entry["part"] in ("loss", "smooth loss", "miner"):
        return f"{text}, {extra * 2**20 / BYTES_OF_FLOAT / entry['sizes']['B'] ** 2:.1f} B^2 floats"
    if entry["part"] == "tree" and entry["process_mib"] is not None:
        return f"{text}, process {entry['process_mib']:.0f} MiB"
    return text
