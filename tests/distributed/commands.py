"""Commands of the benchmarks one after another in the processes of one torchrun, which takes long to start.

Takes a folder and a JSON list of command lines. Each process writes the codes that they end with, and what it printed, to a
file of the folder; it ends like the last command.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from benchmarks import __main__ as cli
from benchmarks.common.ranks import own_rank, process_group


def run(arguments):
    """The code that a command ends with, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            cli.main(arguments)
        except SystemExit as stop:
            return stop.code, printed.getvalue()


if __name__ == "__main__":
    folder, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
    with process_group():
        cli.process_group = contextlib.nullcontext  # they have joined it
        ends = [run(arguments) for arguments in commands]
        (folder / f"rank{own_rank()}.json").write_text(json.dumps(ends))
    sys.exit(ends[-1][0])
