"""What PML's tests ask of its distributed wrappers, asked of them around our classes at a constant margin."""

import pytest
import torch
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper

from pml_htl.losses import CrossBatchMemory

from ..processes import run_processes
from .distributed_cases import BATCH, CASES, DIMENSIONS, WORLD, join_group, run_rank, train
from .shared import assert_close, each_dtype, each_power, each_tree, loss_with, miner_with, random_batch

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_processes(run_rank, WORLD, folder)
    return [torch.load(folder / f"rank{rank}") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.slow
def test_two_processes_do_what_one_does(case, ranks):
    whole = train(case)
    assert (whole["values"] > 0).all() and (whole["gradients"].abs().amax(dim=1) > 1e-3).all()
    found = [rank[str(case)] for rank in ranks]
    if case.efficient:  # each process has the loss of its own anchors
        assert_close(sum(one["values"] for one in found) / WORLD, whole["values"])
    for rank, one in enumerate(found):
        assert_close(one["gradients"], whole["gradients"])
        assert_close(one["weights"], whole["weights"])
        if not case.efficient:
            assert_close(one["values"] / WORLD, whole["values"])
        if case.memory:  # the same samples; in each batch a process has its own first
            for name in ("embeddings", "labels"):
                batches = one[name].reshape(-1, WORLD, BATCH, *one[name].shape[1:])
                assert_close(batches.roll(rank, dims=1).reshape(whole[name].shape), whole[name])
            assert (whole["embeddings"] != 0).all()  # it was filled


@pytest.mark.slow
def test_two_processes_need_labels(ranks):
    for rank in ranks:
        assert all("labels are required" in rank[f"without labels {efficient}"] for efficient in (False, True))


@pytest.fixture
def group(tmp_path):
    join_group(tmp_path / "group")
    yield
    torch.distributed.destroy_process_group()


@each_dtype
@each_tree
@each_power
@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("refs", [False, True])
def test_one_process(dtype, tree, power, efficient, refs, group, device):
    loss, miner = loss_with(tree, power=power), miner_with(tree, 0.5, power, type_of_triplets="semihard")
    batch, more = random_batch(32, dtype, device), random_batch(20, dtype, device, seed=1) if refs else ()
    triplets = DistributedMinerWrapper(miner, efficient=efficient)(*batch, *more)
    expected = miner(*batch, *more)
    assert len(expected[0]) > 0 and all(map(torch.equal, triplets, expected))
    wrapped = DistributedLossWrapper(loss, efficient=efficient)
    for indices in (None, triplets):
        assert loss(*batch, indices, *more) > 0
        assert_close(wrapped(*batch, indices, *more), loss(*batch, indices, *more))
    with pytest.raises(ValueError, match="labels are required"):  # PML's loss takes tuples alone
        wrapped(batch[0], indices_tuple=triplets)


@each_dtype
@each_tree
@each_power
@pytest.mark.parametrize("masked", [False, True])
def test_a_memory_in_one_process(dtype, tree, power, masked, group, device):
    memory, other = (CrossBatchMemory(loss_with(tree, power=power), 6, 15) for _ in range(2))
    wrapped = DistributedLossWrapper(memory)
    for step in range(5):
        batch = random_batch(BATCH, dtype, device, seed=step)
        mask = torch.arange(BATCH, device=device) % 2 == 0 if masked else None
        assert_close(wrapped(*batch, enqueue_mask=mask), other(*batch, enqueue_mask=mask))
        assert torch.equal(memory.embedding_memory, other.embedding_memory)
        assert torch.equal(memory.label_memory, other.label_memory)
    assert memory.queue_idx == other.queue_idx and memory.has_been_filled
    with pytest.raises(ValueError, match="not compatible with ref_emb"):
        wrapped(*batch, ref_emb=batch[0], ref_labels=batch[1])


@each_dtype
@each_tree
def test_without_a_group(dtype, tree, device):
    loss, batch = loss_with(tree), random_batch(BATCH, dtype, device)
    with pytest.warns(UserWarning, match="non-distributed"):
        assert_close(DistributedLossWrapper(loss)(*batch), loss(*batch))


def test_refusals():
    with pytest.raises(ValueError, match="efficient=True is not currently supported"):
        DistributedLossWrapper(CrossBatchMemory(loss_with("unfitted"), DIMENSIONS), efficient=True)
    with pytest.raises(TypeError, match="must extend BaseMiner"):
        DistributedMinerWrapper(loss_with("unfitted"))
    with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):
        DistributedLossWrapper(miner_with("unfitted"))
