"""Processes of a group, for the tests of what they do together."""

import multiprocessing
import sys

import torch

# On Linux they are forks of one that has imported what all need, and has no threads yet: each alone would take seconds.
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"


def run_processes(work, number, *arguments):
    """`work(rank, *arguments)` in each of so many new processes, until all have ended."""
    multiprocessing.set_forkserver_preload(["tests.distributed.cases", "tests.pml.distributed_cases"])
    torch.multiprocessing.start_processes(work, arguments, number, start_method=START_METHOD)
