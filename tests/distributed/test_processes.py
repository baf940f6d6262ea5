"""Two and four gloo processes do together what one does."""

import re

import pytest
import torch

from ..processes import run_processes
from ..rounding import largest, tolerance
from ..threads import one_thread
from . import cases

pytestmark = pytest.mark.slow

TREE = ("labels", "nodes", "nearest_classes", "merge_edges")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """The results of each process."""
    folder = tmp_path_factory.mktemp("ranks")
    run_processes(cases.run_rank, request.param, request.param, folder)
    return [torch.load(folder / f"rank{rank}") for rank in range(request.param)]


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    with one_thread():
        yield


def assert_identical(found):
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def assert_same_tree(found, alone, prefix=""):
    assert_identical(found)
    for name, value in alone.items():
        if name.removeprefix(prefix) in (*TREE, "format_version"):
            assert torch.equal(found[0][name], value), name
        else:
            # of float32 embeddings, which batches of other sizes round differently
            torch.testing.assert_close(found[0][name], value, rtol=0, atol=tolerance(torch.float32, largest(value)))


def test_statistics(ranks):
    alone = cases.statistics(0, 1)
    for rank in ranks:
        found = rank["statistics"]
        assert all(torch.equal(found[name], alone[name]) for name in ("labels", "counts"))
        for name in ("means", "spreads", "average_spread"):
            torch.testing.assert_close(found[name], alone[name], rtol=1e-13, atol=1e-13)


def test_statistics_of_other_sizes(ranks):
    for rank in ranks:
        found = rank["statistics_that_do_not_fit"]
        sizes = ", ".join(str(3 + number) for number in range(len(ranks)))
        assert found["error"] == f"ValueError: the embedding sizes of ranks 0 .. {len(ranks) - 1} differ: {sizes}"
        assert found["counts"].tolist() == [1, 0]


def test_a_fit_at_scale(ranks):
    alone = cases.fit_at_scale(0, 1)
    assert_identical([rank["fit_at_scale"] for rank in ranks])
    for search in ("halves", "rows"):
        for name in ("labels", "nodes"):
            assert torch.equal(ranks[0]["fit_at_scale"][f"{search} {name}"], alone[f"{search} {name}"])
        for name in ("merge_heights", "spreads", "thresholds"):
            found = ranks[0]["fit_at_scale"][f"{search} {name}"]
            torch.testing.assert_close(found, alone[f"{search} {name}"], rtol=1e-5, atol=1e-6)


def test_a_group_of_some_processes(ranks):
    alone = cases.fit_in_a_group(0, 1)
    for number, rank in enumerate(ranks):
        assert rank["fit_in_a_group"].keys() == ({"nodes"} if number % 2 else set())
        assert all(torch.equal(value, alone[name]) for name, value in rank["fit_in_a_group"].items())


@pytest.mark.parametrize("case", ["refresh", "refresh_of_a_part", "refresh_in_a_trainer"])
def test_a_refresh(case, ranks):
    assert_same_tree([rank[case] for rank in ranks], getattr(cases, case)(0, 1))


def test_an_error_on_one_is_an_error_on_all(ranks):
    last = len(ranks) - 1
    for name, own, others in [
        ("data", "OSError: the disk is gone", f"failed on rank {last} of {last + 1}: OSError: the disk is gone"),
        ("workers", "KeyboardInterrupt: Ctrl-C", f"failed on rank {last} of {last + 1}: KeyboardInterrupt: Ctrl-C"),
        ("values", "NaN or infinite", f"failed on rank {last} of {last + 1}: ValueError: .*NaN or infinite"),
    ]:
        for number, rank in enumerate(ranks):
            found = rank["failures"][name]
            if number == last:
                assert own in found and "failed on rank" not in found
            else:
                assert found.startswith("RuntimeError: the refresh of the class tree failed on rank ")
                assert re.search(others, found), found
    for rank in ranks:  # what all see they all say
        found = rank["failures"]
        assert "the embedding sizes of ranks" in found["size"]
        assert "the refresh was given has 24: the data set lacks label -7" in found["classes"]
        assert f"{last + 1} processes share the pass" in found["endless"] and "Endless has no length" in found["endless"]
        assert f"TensorDataset has {last} samples" in found["few"]
    for number, rank in enumerate(ranks):
        expected = "the fit of the class tree failed on rank 0" if number else "MemoryError: no room for the nodes"
        assert expected in rank["failures"]["fit"]
    assert_identical([{"nodes": rank["failures"]["nodes"]} for rank in ranks])


def test_their_batches_are_one_batch(ranks):
    alone = cases.batches(0, 1)
    assert torch.equal(torch.cat([rank["batches"]["batches"] for rank in ranks], dim=1), alone["batches"])
    assert all(torch.equal(rank["batches"]["tree"], alone["tree"]) for rank in ranks)


def test_samplers_without_a_seed_would_draw_apart(ranks):
    assert all("draw parts of one batch: give them the same seed" in rank["without_a_seed"]["error"] for rank in ranks)


def test_gradients(ranks):
    alone = {**cases.gradients(0, 1), **cases.efficient_gradients_emulated(len(ranks))}
    assert len(alone) == 20
    for rank in ranks:
        found = rank["gradients"]
        assert found.keys() == alone.keys()
        for name, value in found.items():
            assert alone[name].abs().max() > 1e-3
            torch.testing.assert_close(value, alone[name], rtol=0, atol=tolerance(value.dtype, largest(alone[name])))
        for kind in ("all", "efficient"):  # the same as PML's loss
            ours, theirs = (found[f"torch.float64 {name} {kind}"] for name in ("constant", "PML's"))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance(ours.dtype, largest(theirs)))


def test_they_train_as_one(ranks):
    alone = cases.train(0, 1)
    untrained = cases.flat(cases.make_model().parameters())
    assert (alone["weights"] - untrained).abs().max() > 1e-2
    allowed = tolerance(torch.float32, steps=12)
    for rank in ranks:
        torch.testing.assert_close(rank["train"]["weights"], alone["weights"], rtol=0, atol=allowed)
        assert torch.equal(rank["train"]["nodes"], alone["nodes"])


@pytest.mark.filterwarnings("ignore:the tree stays as it is")
def test_a_streaming_tree(ranks):
    alone = cases.streaming(0, 1)
    found = [rank["streaming"] for rank in ranks]
    for prefix in ("early ", "own ", "joint "):
        parts = [{name: value for name, value in one.items() if name.startswith(prefix)} for one in (*found, alone)]
        assert_same_tree(parts[:-1], parts[-1], prefix)
