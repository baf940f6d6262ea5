"""Two gloo processes of accelerate, and of Hugging Face's Trainer, do together what one does; what would not is refused."""

import re

import pytest
import torch

from ..processes import run_processes
from ..rounding import tolerance
from .test_processes import few_threads  # noqa: F401

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from . import engines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each process."""
    folder = tmp_path_factory.mktemp("ranks")
    run_processes(engines.run_rank, 2, folder)
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


@pytest.mark.parametrize("name", engines.RIGHT)
def test_their_batches_are_one_batch(name, ranks):
    assert torch.equal(torch.cat([rank["batches", name] for rank in ranks], dim=1), engines.batches("not prepared"))


@pytest.mark.parametrize("name", [*engines.WRONG, "hugging_face"])
def test_parts_that_do_not_belong_together_are_refused(name, ranks):
    for rank in ranks[:1] if name == "dispatched" else ranks:
        if name == "no seed":
            assert "deals out the batches of 2 samplers: give them the same seed" in rank["refused", name]
        else:
            remedies = "do not prepare the loader; or prepare it with .*split_batches=True.* num_replicas=1, rank=0"
            assert re.search(remedies, rank["refused", name])


def assert_same_training(found, alone):
    assert (alone["weights"] - engines.flat(engines.make_model().parameters())).abs().max() > 1e-2
    for one in found:
        torch.testing.assert_close(one["weights"], alone["weights"], rtol=0, atol=tolerance(torch.float32, steps=12))
        assert torch.equal(one["nodes"], alone["nodes"])


@pytest.mark.parametrize("name", engines.RIGHT)
def test_they_train_as_one(name, ranks):
    assert_same_training([rank["train", name] for rank in ranks], engines.train("not prepared"))


def test_hugging_faces_trainer(ranks):
    assert_same_training([rank["hugging_face"] for rank in ranks], engines.hugging_face())
