import os

import hypothesis
import pytest
import torch

# The same examples every time, so that a red test is red again when it is run again.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
# Others and more of them, for what holds only by luck of the examples: pytest --hypothesis-profile=wide --hypothesis-seed=1
hypothesis.settings.register_profile("wide", deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture
def device():
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
