"""The results file: JSON with metadata and one entry per method, seed and split. Written whole or not at all."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import pml_htl

from ..common.commit import current_commit
from ..methods.contenders import Contender, find_method
from ..training.evaluation import METRICS
from ..training.train import Outcome, Plan
from . import study, timings

PACKAGES = ("torch", "pytorch-metric-learning", "numpy", "scipy", "faiss-cpu", "faiss-gpu", "matplotlib", "pillow")
METADATA = ("commit", "versions", "threads", "device", "date", "command", "data", "plan", "sessions")
RUN = {
    "method": str,
    "seed": int,
    "split": str,
    "iterations": int,
    **dict.fromkeys(METRICS.values(), float),
    "train_seconds": float,
    "refresh_seconds": float,
    "settings": dict,
}
CURVE = {"method": str, "seed": int, "iterations": list, "map_at_r": list, "settings": dict}
OPTIONAL: dict[str, dict[str, type]] = {
    "runs": {"label": str, "recall": dict},
    "curves": {"label": str, "seconds": list, "nearness": dict},
}


class Results:
    """The results file of an output folder; `runs` of earlier sessions are kept.

    Raises:
        ValueError: there is a file, and it is not one of ours or its plan or data are not the same.
    """

    def __init__(self, path: Path, plan: Plan, data: dict[str, Any]) -> None:
        self.path = path
        self.iterations = plan.iterations
        self.document: dict[str, Any] = {"metadata": {}, "runs": [], "curves": []}
        if path.exists():
            self.document = load(path)
            for name, wanted in (("plan", plan.comparable()), ("data", data)):
                found = self.document["metadata"][name]
                if found != wanted:
                    raise ValueError(f"{path} was made with {name} {found}, but now it is {wanted}; choose another --output")
        sessions = self.document["metadata"].get("sessions", [])
        session = describe_session(plan.device)
        self.document["metadata"] = {
            **session,
            "plan": plan.comparable(),
            "data": data,
            # Which runs were made where and by which code: those of a session are from its first on.
            "sessions": [*sessions, {**session, "first_run": len(self.runs)}],
        }

    def has(self, contender: Contender, seed: int) -> bool:
        """Whether this run is in the file."""
        wanted = contender.method.name, contender.settings, seed
        return any((run["method"], run["settings"], run["seed"]) == wanted for run in self.runs)

    def check_title(self, contender: Contender) -> None:
        """Raises a `ValueError` if this title is that of other settings in the file: the two would be taken for one."""
        for run in self.runs:
            same = (run["method"], run["settings"]) == (contender.method.name, contender.settings)
            if title_of(run) == contender.title and not same:
                raise ValueError(
                    f"in {self.path} {contender.title} has other settings, {run['settings']}, than it has now, "
                    f"{contender.settings}: those of another study, say; choose another --output"
                )

    def add(self, contender: Contender, seed: int, outcome: Outcome) -> None:
        """Adds a finished run and writes the file."""
        shared = {"method": contender.method.name, "seed": seed, "settings": contender.settings}
        if contender.label:
            shared["label"] = contender.label
        seconds = {
            "train_seconds": round(outcome.train_seconds, 2),
            "refresh_seconds": round(outcome.refresh_seconds, 2),
        }
        for split, accuracies in outcome.accuracies.items():
            self.runs.append({**shared, "split": split, "iterations": self.iterations, **accuracies, **seconds})
        steps, values, times = zip(*outcome.curve, strict=True)
        curve: dict[str, Any] = {
            "iterations": list(steps),
            "map_at_r": list(values),
            "seconds": [round(time, 2) for time in times],
        }
        if outcome.nearness:
            curve["nearness"] = outcome.nearness
        self.document["curves"].append({**shared, **curve})
        validate(self.document)
        save(self.document, self.path)

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.document["runs"]


def load(path: Path) -> dict[str, Any]:
    """A results file, validated."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a results file: {error}") from error
    validate(document)
    return document


def only(document: dict[str, Any], titles: list[str]) -> dict[str, Any]:
    """The part of a comparison's results file that is of contenders with these titles.

    Raises:
        ValueError: it is the file of something else, or has none with such a title.
    """
    return only_in_any({"": document}, titles)[""]


def only_in_any(documents: dict[str, dict[str, Any]], titles: list[str]) -> dict[str, dict[str, Any]]:
    """The same for several files, each of which has some of the titles.

    Raises:
        ValueError: one is the file of something else, a title is in none of them, or a file has none of the titles.
    """
    if any("runs" not in document for document in documents.values()):
        raise ValueError("--methods chooses among the methods of a comparison, and a file is of something else")
    by_file = {name: {title_of(run) for run in document["runs"]} for name, document in documents.items()}
    known = set[str]().union(*by_file.values())
    if not known.issuperset(titles):
        raise ValueError(f"there is no {', '.join(sorted({*titles} - known))} in it; there are {', '.join(sorted(known))}")
    for name, own in by_file.items():
        if own.isdisjoint(titles):
            raise ValueError(f"{name} has none of {', '.join(titles)}; it has {', '.join(sorted(own))}")
    return {
        name: {
            **document,
            **{kind: [entry for entry in document[kind] if title_of(entry) in titles] for kind in ("runs", "curves")},
        }
        for name, document in documents.items()
    }


def save(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def validate(document: Any) -> None:
    """Raises a `ValueError` that names what is not as it should be."""
    for kind, check in (("measurements", timings.validate), ("studies", study.validate)):
        if isinstance(document, dict) and kind in document:
            check(document)
            return
    if not isinstance(document, dict) or not {"metadata", "runs", "curves"} <= document.keys():
        raise ValueError("a results file has metadata, runs and curves")
    missing = [name for name in METADATA if document["metadata"].get(name) is None]
    if missing:
        raise ValueError(f"the metadata lack {', '.join(missing)}")
    for kind, schema in (("runs", RUN), ("curves", CURVE)):
        if not isinstance(document[kind], list) or not document[kind]:
            raise ValueError(f"{kind} should be a list that is not empty")
        for number, entry in enumerate(document[kind]):
            where = f"{kind}[{number}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{where} should be an object, but it is {entry!r}")
            for name, wanted in schema.items():
                value = entry.get(name)
                if not isinstance(value, wanted) or isinstance(value, bool):
                    raise ValueError(f"{where}: {name} should be a {wanted.__name__}, but it is {value!r}")
            for name, wanted in OPTIONAL[kind].items():
                if name in entry and not isinstance(entry[name], wanted):
                    raise ValueError(f"{where}: {name} should be a {wanted.__name__}, but it is {entry[name]!r}")
            extra = entry.keys() - schema.keys() - OPTIONAL[kind].keys()
            if extra:
                raise ValueError(f"{where}: unknown {', '.join(sorted(extra))}")
            accuracies = entry["map_at_r"] if kind == "curves" else [entry[name] for name in METRICS.values()]
            accuracies = [*accuracies, *entry.get("recall", {}).values()]
            if not all(isinstance(accuracy, float) and 0 <= accuracy <= 1 for accuracy in accuracies):
                raise ValueError(f"{where}: accuracies should be in 0..1, but they are {accuracies}")
            if kind == "runs" and entry["split"] not in ("test", "validation"):
                raise ValueError(f"{where}: split should be test or validation, but it is {entry['split']!r}")
    keys = [(run["method"], str(run["settings"]), run["seed"], run["iterations"], run["split"]) for run in document["runs"]]
    if len(set(keys)) < len(keys):
        raise ValueError("some run stands in it twice")


def describe_session(device: str) -> dict[str, Any]:
    """Where, when and by what a results file is made."""
    versions = {"python": platform.python_version(), "pml-htl": pml_htl.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    processor = {"processor": processor_name(), "kernels": torch.backends.cpu.get_cpu_capability()}
    return {
        "commit": current_commit() or "unknown",
        "versions": versions,
        "threads": torch.get_num_threads(),
        "device": {
            "name": name,
            "machine": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
            **processor,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


def processor_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def summarize(document: dict[str, Any]) -> pd.DataFrame:
    """A row per method and settings, best test MAP@R first: means over seeds.

    Columns: title, seeds, iterations, validation, map_at_r, precision_at_1, r_precision,
    train_seconds, refresh_seconds; and R@K for each recall of the data set.
    """
    runs = pd.DataFrame(document["runs"])
    runs["title"] = [title_of(run) for run in document["runs"]]
    by_split = {split: part.groupby("title", sort=False) for split, part in runs.groupby("split")}
    recalls = [f"R@{k}" for k in document["runs"][0].get("recall", {})]
    for column in recalls:
        runs[column] = [run["recall"][column[2:]] for run in document["runs"]]
    test = runs[runs["split"] == "test"].groupby("title", sort=False)
    summary = test[[*METRICS.values(), *recalls, "train_seconds", "refresh_seconds"]].mean()
    summary.insert(0, "seeds", test.size())
    summary.insert(1, "iterations", test["iterations"].first())  # the same for all runs of a file
    summary.insert(2, "validation", by_split["validation"]["map_at_r"].mean())
    return summary.reset_index().sort_values("map_at_r", ascending=False, ignore_index=True)


def title_of(entry: dict[str, Any]) -> str:
    """The title of the contender of a run or curve: its label, or its settings as far as they are not today's defaults."""
    if "label" in entry:
        return entry["label"]
    method = find_method(entry["method"], entry["settings"])
    changes = {name: value for name, value in entry["settings"].items() if method.defaults.get(name) != value}
    return Contender(method, changes).title


def readable(title: str) -> str:
    """For a table or a picture: long numbers, as a search finds them, in three digits."""
    return re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3g}", title)
