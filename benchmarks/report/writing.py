"""Writes the report, and the files that it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import page


def write_report(files: list[Path], output: Path) -> None:
    """The page, and the same as Markdown beside it.

    Raises:
        ValueError: a file is nothing that a report is made of.
    """
    found = page.read(files)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page.html(found), encoding="utf-8")
    output.with_suffix(".md").write_text(page.markdown(found), encoding="utf-8")


def save_compact(document: dict[str, Any], path: Path) -> None:
    """As JSON without white space: people look at it by the report."""
    path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
