"""How many threads torch computes with in tests of many small calls, in which threads would mostly wait for each other."""

import os
from contextlib import contextmanager

import torch


@contextmanager
def one_thread():
    """One, unless `OMP_NUM_THREADS` says otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    yield
    torch.set_num_threads(before)
