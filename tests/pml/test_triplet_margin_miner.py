"""What PML's tests ask of `TripletMarginMiner`, asked of `DynamicMarginMiner` at a constant margin."""

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import TripletMarginMiner

from .. import oracle
from .shared import each_dtype, each_power, each_tree, miner_with, on_a_circle, random_batch

pytestmark = pytest.mark.numerical

WANTED = {
    "all": lambda gap, margin: gap <= margin,
    "hard": lambda gap, margin: gap <= margin and gap <= 0,
    "semihard": lambda gap, margin: 0 < gap <= margin,
    "easy": lambda gap, margin: gap > margin,
}
each_kind = pytest.mark.parametrize("kind", WANTED)
STATS = ("pos_pair_dist", "neg_pair_dist", "avg_triplet_margin")
MARGINS = [0.05 * step for step in range(-1, 11)]


def sixteen_points(dtype, device, num_labels=2):
    labels = torch.randint(num_labels, (16,), generator=torch.Generator().manual_seed(0))
    return on_a_circle(range(16), dtype, device), labels.to(device)


def listed(indices):
    return sorted(zip(*(index.tolist() for index in indices), strict=True))


def mined_by_hand(distances, triplets, kind, margin):
    """Those of the triplets that `kind` wants; `distances` (B, R) as nested lists."""
    gap = {(a, p, n): distances[a][n] - distances[a][p] for a, p, n in triplets}
    return [triplet for triplet in triplets if WANTED[kind](gap[triplet], margin)]


@each_dtype
@each_tree
@each_power
@each_kind
def test_mined_triplets(dtype, tree, power, kind, device):
    embeddings, labels = sixteen_points(dtype, device)
    triplets = oracle.triplets(labels.tolist())
    distances = LpDistance(power=power)(embeddings).tolist()  # what is a tie is for the distance to say
    sizes = set()
    for margin in MARGINS:
        found = miner_with(tree, margin, power, type_of_triplets=kind)(embeddings, labels)
        expected = mined_by_hand(distances, triplets, kind, margin)
        assert listed(found) == expected
        assert all(index.dtype == torch.int64 and index.device.type == device.type for index in found)
        sizes.add(len(expected))
    assert len(sizes) > 1  # the margin matters


@each_dtype
@each_tree
@each_power
@each_kind
def test_mined_from_reference_embeddings(dtype, tree, power, kind, device):
    embeddings, labels = random_batch(9, dtype, device)
    ref_emb, ref_labels = random_batch(12, dtype, device, seed=1)
    triplets = oracle.triplets(labels.tolist(), ref_labels.tolist())
    distances = LpDistance(power=power)(embeddings, ref_emb).tolist()
    for margin in (-0.3, 0.1, 0.5):
        found = miner_with(tree, margin, power, type_of_triplets=kind)(embeddings, labels, ref_emb, ref_labels)
        assert listed(found) == mined_by_hand(distances, triplets, kind, margin)


@each_dtype
@each_tree
@each_kind
def test_power_two_mines_as_the_cosine_does(dtype, tree, kind, device):
    embeddings, labels = random_batch(16, dtype, device, num_labels=2)  # |x - y|^2 = 2 - 2 cos(x, y)
    triplets = oracle.triplets(labels.tolist())
    units = torch.nn.functional.normalize(embeddings)
    for margin in MARGINS:
        found = listed(miner_with(tree, 2 * margin, type_of_triplets=kind)(embeddings, labels))
        assert found == mined_by_hand((-units @ units.T).tolist(), triplets, kind, margin)
        pmls = TripletMarginMiner(margin, type_of_triplets=kind, distance=CosineSimilarity())
        assert found == listed(pmls(embeddings, labels))


@each_dtype
@each_tree
@each_kind
def test_no_triplets(dtype, tree, kind, device):
    embeddings, _ = random_batch(32, dtype, device)
    for labels in (torch.arange(32), torch.zeros(32, dtype=torch.int64)):
        found = miner_with(tree, 0.5, type_of_triplets=kind)(embeddings, labels)
        assert len(found) == 3 and all(len(index) == 0 and index.dtype == torch.int64 for index in found)


@each_dtype
@each_tree
@each_power
def test_stats(dtype, tree, power, device):
    embeddings, labels = sixteen_points(dtype, device, num_labels=3)
    miner = miner_with(tree, 0.05, power)
    found = miner(embeddings, labels)
    assert miner.num_triplets == len(found[0]) > 0
    assert not any(hasattr(miner, name) for name in STATS)

    miner = miner_with(tree, 0.05, power, collect_stats=True)
    miner(embeddings, labels)
    distances = LpDistance(power=power)(embeddings).tolist()
    to_positives, to_negatives = (
        [distances[triplet[0]][triplet[place]] for triplet in oracle.triplets(labels.tolist())] for place in (1, 2)
    )
    pos_pair_dist, neg_pair_dist = (sum(some) / len(some) for some in (to_positives, to_negatives))
    expected = {
        "pos_pair_dist": pos_pair_dist,
        "neg_pair_dist": neg_pair_dist,
        "avg_triplet_margin": neg_pair_dist - pos_pair_dist,
    }
    assert {name: getattr(miner, name) for name in STATS} == pytest.approx(expected, abs=1e-6)
    assert set(STATS) <= set(miner._record_these_stats) and "initial_margin" in miner._record_these
