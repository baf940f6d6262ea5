import os

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Many small calls, for which threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    yield
    torch.set_num_threads(before)
