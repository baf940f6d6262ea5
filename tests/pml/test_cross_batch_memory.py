"""What PML's tests ask of `CrossBatchMemory`, asked of ours around `HierarchicalTripletLoss` at a constant margin."""

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import DistanceWeightedMiner, MultiSimilarityMiner, TripletMarginMiner

from pml_htl.losses import CrossBatchMemory

from .. import oracle
from .by_hand import Ring, indices_by_hand, losses_by_hand, mean_of_positive, triplets_of
from .shared import (
    MARGIN,
    assert_close,
    each_dtype,
    each_power,
    each_tree,
    loss_with,
    miner_with,
    on_a_circle,
    random_batch,
)

pytestmark = pytest.mark.numerical

BATCH, DIMENSIONS, MEMORY = 8, 6, 20  # the memory wraps inside a batch
MASK = torch.tensor([True, False, True, True, False, True, False, True])
STEPS = 8
MINERS = {  # of the memory: ours, and PML's for what is computed by hand
    "all pairs": lambda tree, power: (None, None),
    "pair miner": lambda tree, power: (MultiSimilarityMiner(0.3), MultiSimilarityMiner(0.3)),
    "triplet miner": lambda tree, power: (
        miner_with(tree, 0.5, power, type_of_triplets="semihard"),
        TripletMarginMiner(0.5, "semihard", distance=LpDistance(power=power)),
    ),
}
INPUTS = {
    "no input": lambda embeddings, labels: None,
    "pairs": MultiSimilarityMiner(0.2),
    "triplets": TripletMarginMiner(0.1, "hard"),
}
each_miner = pytest.mark.parametrize("miner", MINERS)
each_input = pytest.mark.parametrize("tuples", INPUTS)
masked_or_not = pytest.mark.parametrize("mask", [None, MASK], ids=["whole batch", "mask"])


def memory_with(tree, power=2, miner=None, size=MEMORY, **kwargs):
    return CrossBatchMemory(loss_with(tree, power=power, **kwargs), DIMENSIONS, size, miner=miner)


@each_dtype
@each_tree
@masked_or_not
def test_queue(dtype, tree, mask, device):
    memory, ring = memory_with(tree), Ring(MEMORY)
    for _ in range(2):  # the second time after a reset
        for step in range(30):
            embeddings, labels = random_batch(BATCH, dtype, device, seed=step)
            leaf = embeddings.clone().requires_grad_()
            assert memory.queue_idx == ring.count % MEMORY
            assert memory.has_been_filled == (ring.count >= MEMORY)
            memory(leaf, labels, enqueue_mask=mask).backward()
            slots = ring.add(embeddings, labels) if mask is None else ring.add(embeddings[mask], labels[mask])
            assert memory.curr_batch_idx.tolist() == slots
            filled = len(ring.slots)
            assert torch.equal(memory.embedding_memory[:filled], ring.embeddings)
            assert memory.label_memory[:filled].tolist() == ring.labels
            assert (memory.embedding_memory[filled:] == 0).all() and not memory.embedding_memory.requires_grad
            if mask is not None:  # what is only remembered is not trained on
                assert (leaf.grad[mask] == 0).all() and (step == 0 or (leaf.grad[~mask] != 0).any())
        assert ring.count > 7 * MEMORY
        memory.reset_queue()
        ring = Ring(MEMORY)
        assert memory.queue_idx == 0 and (memory.embedding_memory == 0).all()


def assert_same(loss, expected, leaf, other):
    """Two losses, and their gradients with respect to a leaf of each."""
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_close(leaf.grad, other.grad)


@each_dtype
@each_tree
@each_power
@each_miner
@each_input
def test_loss(dtype, tree, power, miner, tuples, device):
    ours, pmls = MINERS[miner](tree, power)
    memory, ring = memory_with(tree, power, ours), Ring(MEMORY)
    for step in range(STEPS):
        embeddings, labels = random_batch(BATCH, dtype, device, seed=step, num_labels=3)
        leaf, other = (embeddings.clone().requires_grad_() for _ in range(2))
        given = INPUTS[tuples](embeddings, labels)
        loss = memory(leaf, labels, given)
        slots = ring.add(embeddings, labels)
        triplets = triplets_of(indices_by_hand(pmls, embeddings, labels, ring, slots, given))
        expected = mean_of_positive(losses_by_hand(other, ring.embeddings, triplets, power=power))
        assert expected > 0
        assert_same(loss, expected, leaf, other)


@each_dtype
@each_tree
@each_power
@each_miner
def test_loss_with_enqueue_mask(dtype, tree, power, miner, device):
    ours, pmls = MINERS[miner](tree, power)
    memory, ring = memory_with(tree, power, ours), Ring(MEMORY)
    for step in range(STEPS):
        embeddings, labels = random_batch(BATCH, dtype, device, seed=step, num_labels=2)
        leaf, other = (embeddings.clone().requires_grad_() for _ in range(2))
        loss = memory(leaf, labels, enqueue_mask=MASK.to(device))
        ring.add(embeddings[MASK], labels[MASK])
        triplets = triplets_of(indices_by_hand(pmls, embeddings[~MASK], labels[~MASK], ring, None, None))
        expected = mean_of_positive(losses_by_hand(other[~MASK], ring.embeddings, triplets, power=power))
        assert_same(loss, expected, leaf, other)


@each_dtype
@each_tree
@each_miner
@each_input
def test_indices_are_the_memorys_and_the_given_ones(dtype, tree, miner, tuples, device):
    ours, pmls = MINERS[miner](tree, 2)
    memory, ring = memory_with(tree, miner=ours), Ring(MEMORY)
    for step in range(STEPS):
        embeddings, labels = random_batch(BATCH, dtype, device, seed=step, num_labels=3)
        memory(embeddings, labels)
        slots = ring.add(embeddings, labels)
        ref_labels = torch.tensor(ring.labels, device=device)
        given = INPUTS[tuples](embeddings, labels)
        for removes in (True, False):
            arguments = (embeddings, labels, ring.embeddings, ref_labels, given, removes)
            found = memory.create_indices_tuple(*arguments)
            expected = indices_by_hand(pmls, embeddings, labels, ring, slots if removes else None, given)
            assert [index.tolist() for index in found] == [index.tolist() for index in expected]


@each_dtype
@each_tree
def test_mining_in_the_memory(dtype, tree, device):
    memory, miner = memory_with(tree), miner_with(tree, 1.0)
    for step in range(STEPS):
        embeddings, labels = random_batch(BATCH, dtype, device, seed=step)
        labels = torch.arange(BATCH, device=device)
        memory(embeddings, labels)
        if memory.has_been_filled:
            a, p, n = miner(embeddings, labels, memory.embedding_memory, memory.label_memory)
            assert len(a) > 0
            assert (labels[a] == memory.label_memory[p]).all() and (labels[a] != memory.label_memory[n]).all()


@each_dtype
@each_tree
@pytest.mark.parametrize("size", [20, 25, 30, 35])
@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_memory_of_one_batch_changes_nothing(dtype, tree, size, mined, masked, device):
    loss, miner = loss_with(tree), miner_with(tree, 0.1) if mined else None
    memory = memory_with(tree, miner=miner, size=size)
    for seed in range(104, 108):  # no triplet within 7e-5 of its margin, where rounding of float32 might decide
        embeddings, labels = random_batch(2 * size if masked else size, dtype, device, seed=seed)
        if masked:  # the first half is compared with the second: the same triplets of the batch as one
            mask = torch.arange(2 * size) >= size
            refs = embeddings[size:], labels[size:]
            first = embeddings[:size], labels[:size]
            triplets = (
                oracle.triplets(*(part.tolist() for part in (first[1], refs[1]))) if not mined else miner(*first, *refs)
            )
            triplets = torch.tensor(triplets).T if not mined else triplets
            indices_tuple = (triplets[0], triplets[1] + size, triplets[2] + size)
        else:
            mask, indices_tuple = None, miner(embeddings, labels) if mined else None
        assert_close(memory(embeddings, labels, enqueue_mask=mask), loss(embeddings, labels, indices_tuple))


@each_dtype
@each_tree
def test_with_distance_weighted_miner(dtype, tree, device):
    miner = DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)
    pmls = pml_losses.TripletMarginLoss(MARGIN, distance=LpDistance(power=1))
    memories = [
        CrossBatchMemory(loss_with(tree, power=1), 2, 80, miner=miner),
        pml_losses.CrossBatchMemory(pmls, 2, 80, miner=miner),
    ]
    for step in range(6):
        labels = torch.randint(10, (32,), generator=torch.Generator().manual_seed(step))
        results = []
        for memory in memories:
            # Not the points of the memory: of plain distances near zero half the digits are left, and PML's are not zero.
            embeddings = on_a_circle(3.75 * step + 11.25 * torch.arange(32), dtype, device)
            torch.manual_seed(step)
            loss = memory(embeddings, labels)
            loss.backward()
            results.append((loss.detach(), embeddings.grad))
        for one, other in zip(*results, strict=True):
            assert_close(one, other)
        assert results[0][0] > 0 and results[0][1].isfinite().all()


def test_which_losses_it_takes(device):
    pmls = pml_losses.CrossBatchMemory
    assert issubclass(CrossBatchMemory, pmls)
    assert set(CrossBatchMemory.supported_losses()) == {*pmls.supported_losses(), "HierarchicalTripletLoss"}
    with pytest.raises(Exception, match="not supported for HierarchicalTripletLoss"):
        pmls(loss_with("unfitted"), DIMENSIONS)
    with pytest.raises(Exception, match="not supported for ArcFaceLoss"):
        CrossBatchMemory(pml_losses.ArcFaceLoss(4, DIMENSIONS), DIMENSIONS)
    embeddings, labels = random_batch(BATCH, torch.float64, device)
    with pytest.raises(ValueError, match="mutually exclusive"):
        memory_with("unfitted")(embeddings, labels, INPUTS["triplets"](embeddings, labels), enqueue_mask=MASK)
    with pytest.raises(AssertionError):
        memory_with("unfitted", size=BATCH - 1)(embeddings, labels)
