"""The command line: `python -m benchmarks` runs the quick preset, `python -m benchmarks --help` shows everything."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TQDM_DISABLE", "1")  # before PML is imported; see parallel.quiet

try:
    import matplotlib  # noqa: F401
    import pandas  # noqa: F401
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as error:
    sys.exit(f'The benchmarks need {error.name}: pip install ".[benchmarks,with-hooks-cpu]"')
try:
    import faiss  # noqa: F401
    import record_keeper  # noqa: F401
    import tensorboard  # noqa: F401
except ImportError as error:
    sys.exit(f'PML\'s hooks need {error.name}: pip install ".[with-hooks-cpu]" (or with-hooks, for faiss-gpu)')

from .commands import train, look, time, show  # noqa: F401, I001  (in the order of --help)
from .commands.app import app, console, spread_lists
from .common.ranks import is_first, process_group
from .training.parallel import quiet


def main(arguments: list[str] | None = None) -> None:
    """Runs a command, by default that of the command line; under torchrun only the first process prints."""
    quiet()
    with process_group():
        console.quiet = not is_first()
        app(spread_lists(sys.argv[1:] if arguments is None else arguments), prog_name="python -m benchmarks")


if __name__ == "__main__":
    main()
