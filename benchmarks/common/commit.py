"""Which code runs."""

from __future__ import annotations

import subprocess
from pathlib import Path


def current_commit() -> str | None:
    """The commit of the code that runs, with "-dirty" behind it if there are changes; None outside a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = (":/pml_htl", ":/benchmarks/*.py")
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return None
