import os

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Batches are tiny here, and threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    yield
    torch.set_num_threads(before)
