"""Models whose weights FSDP shares out among two gloo processes: they refresh and train as one process does."""

import pytest
import torch

from ..processes import run_processes
from ..rounding import tolerance
from . import sharded
from .test_processes import assert_identical, assert_same_tree, few_threads  # noqa: F401

pytestmark = pytest.mark.slow

wrappers = pytest.mark.parametrize("wrapper", sharded.WRAPPERS)


def alone(model):
    return model


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each process."""
    folder = tmp_path_factory.mktemp("ranks")
    run_processes(sharded.run_rank, 2, folder)
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


@wrappers
@pytest.mark.parametrize("case", [sharded.refresh, sharded.refresh_in_a_trainer])
def test_a_refresh(case, wrapper, ranks):
    assert_same_tree([rank[wrapper, case.__name__] for rank in ranks], case(alone))


@wrappers
def test_they_train_as_one(wrapper, ranks):
    expected = sharded.train(alone)
    assert (expected["weights"] - sharded.whole(sharded.make_model())).abs().max() > 1e-2
    for found in (rank[wrapper, "train"] for rank in ranks):
        allowed = tolerance(torch.float32, steps=4)
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=allowed)
        assert torch.equal(found["nodes"], expected["nodes"])


@wrappers
def test_an_error_on_one_is_an_error_on_all(wrapper, ranks):
    for at, failed in ((1, 1), (64, 0)):
        for kind, error in (("data", "OSError: the disk is gone"), ("values", "NaN or infinite")):
            for number, rank in enumerate(ranks):
                found = rank[wrapper, "failures"][f"{kind} {at}"]
                told = f"RuntimeError: the refresh of the class tree failed on rank {failed} of 2: "
                assert error in found and found.startswith(told) == (number != failed), found


def test_an_error_in_a_forward_pass_is_raised_at_once(ranks):
    """The other learns of it when that process has ended."""
    other, own = (rank["forward"] for rank in ranks)
    assert own == "MemoryError: no room for the activations"
    assert other.startswith("RuntimeError: ") and "activations" not in other
