import hypothesis
import pytest
import torch

# The same examples every time, so that a red test is red again when it is run again.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(2)


@pytest.fixture
def device():
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
