"""Networks that are trained already: that of a run of a comparison, or one with weights in a file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .networks import make_network
from .train import InPrecision, Plan


def plan_of_run(run: Path) -> tuple[Plan, str]:
    """How a run was trained and the name of its data, by the results file of the comparison that it belongs to.

    Args:
        run: a folder such as runs/compare/runs/htl-seed0.

    Raises:
        ValueError: it is no such folder.
    """
    file = run.parent.parent / "results.json"
    if not (run / "models").is_dir() or not file.exists():
        raise ValueError(
            f"{run} is no training of a comparison: those are in the folder runs of its --output, such as "
            "runs/compare/runs/htl-seed0"
        )
    metadata: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["metadata"]
    known = {field.name for field in fields(Plan)}
    return Plan(**{name: value for name, value in metadata["plan"].items() if name in known}), metadata["data"]["name"]


def network_of_run(run: Path, plan: Plan, channels: int) -> torch.nn.Module:
    """The network of the best epoch, images to embeddings, in evaluation mode.

    Raises:
        ValueError: its models are not there.
    """
    trunk, width = make_network(plan.network, channels, 0)
    parts = {"trunk": trunk, "embedder": torch.nn.Linear(width, plan.embedding_size)}
    for name, module in parts.items():
        files = sorted((run / "models").glob(f"{name}_best[0-9]*.pth"))
        if len(files) != 1:
            raise ValueError(f"there should be one {name}_best*.pth in {run / 'models'}, but there are {len(files)}")
        parts[name] = InPrecision(module, plan.precision)
        parts[name].load_state_dict(torch.load(files[0], map_location="cpu", weights_only=True))
    return torch.nn.Sequential(*parts.values()).eval()
