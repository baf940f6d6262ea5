"""Processes that tests start, alone or as a group."""

import multiprocessing
import os
import sys
from pathlib import Path

import torch

# On Linux they are forks of one that has imported what all need, and has no threads yet: each alone would take seconds.
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"


def environment(**changes):
    """Of a process that finds the repository, whatever folder it is started in."""
    found = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found), **changes}


def run_processes(work, number, *arguments):
    """`work(rank, *arguments)` in each of so many new processes, until all have ended."""
    multiprocessing.set_forkserver_preload(["tests.distributed.cases", "tests.pml.distributed_cases"])
    torch.multiprocessing.start_processes(work, arguments, number, start_method=START_METHOD)
