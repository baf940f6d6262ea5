import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance, SNRDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss

from . import oracle
from .examples import labelled_embeddings, make_embeddings
from .test_losses import margins_from_the_equations

pytestmark = pytest.mark.numerical

TYPES = ("all", "hard", "semihard", "easy")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("power", [1, 2])
@given(labelled_embeddings(), st.booleans())
def test_not_fitted_it_is_pmls_miner(kind, power, example, with_ref):
    embeddings, labels = (torch.from_numpy(array) for array in example)
    embeddings = embeddings.float()
    ref = (embeddings.flip(0)[:8], labels.flip(0)[:8]) if with_ref else (None, None)
    kwargs = {"type_of_triplets": kind, "distance": LpDistance(power=power), "collect_stats": True}
    ours, pmls = DynamicMarginMiner(ClassTree(), initial_margin=0.4, **kwargs), TripletMarginMiner(0.4, **kwargs)
    found, expected = ours(embeddings, labels, *ref), pmls(embeddings, labels, *ref)
    assert all(map(torch.equal, found, expected))
    assert all(index.dtype == torch.int64 for index in found)
    for name in ("num_triplets", "pos_pair_dist", "neg_pair_dist", "avg_triplet_margin"):
        assert getattr(ours, name) == pytest.approx(getattr(pmls, name), abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("kind", TYPES)
@given(labelled_embeddings(kinds=["random", "clustered"]), st.sampled_from([1, 2]))
def test_fitted_it_mines_by_each_pairs_own_margin(kind, example, power):
    embeddings, labels = example
    tree = ClassTree(4).fit_embeddings(torch.from_numpy(embeddings), labels)
    margin_of = margins_from_the_equations(embeddings, labels, 4, power)
    expected = []
    for a, p, n in oracle.triplets(labels):
        to_positive, to_negative = (oracle.squared_distance(embeddings[a], embeddings[x]) ** (power / 2) for x in (p, n))
        gap, alpha = to_negative - to_positive, margin_of(labels[a], labels[n])
        wanted = {
            "all": gap <= alpha,
            "hard": gap <= alpha and gap <= 0,
            "semihard": 0 < gap <= alpha,
            "easy": gap > alpha,
        }[kind]
        if wanted:
            expected.append((a, p, n))
    miner = DynamicMarginMiner(tree, type_of_triplets=kind, distance=LpDistance(power=power))
    found = torch.stack(miner(torch.from_numpy(embeddings), torch.from_numpy(labels)), dim=1)
    assert set(map(tuple, found.tolist())) == set(expected) and len(found) == len(expected)


def test_margins_have_the_units_of_the_distance():
    embeddings, labels = make_embeddings("clustered", [4] * 6, 5, seed=0)
    tree = ClassTree().fit_embeddings(torch.from_numpy(embeddings), labels)
    for power in (1, 2):
        miner = DynamicMarginMiner(tree, beta=0.25, distance=LpDistance(power=power))
        alpha = miner.margins(tree.labels.unsqueeze(1), tree.labels)
        thresholds = tree.merge_thresholds(tree.labels.unsqueeze(1), tree.labels)
        expected = 0.25 + thresholds ** (power / 2) - tree.spreads.unsqueeze(1) ** (power / 2)
        torch.testing.assert_close(alpha, expected)
        assert miner.margins(int(tree.labels[0]), tree.labels[1]).shape == ()
    assert (alpha != alpha.T).any()  # the anchor's class counts, not the negative's


@given(labelled_embeddings(kinds=["random", "clustered"]), st.sampled_from([1, 2]), st.floats(-0.5, 0.5))
def test_margins_are_those_of_the_equation(example, power, beta):
    embeddings, labels = example
    tree = ClassTree(4).fit_embeddings(torch.from_numpy(embeddings), labels)
    spreads, average = oracle.spreads(embeddings, labels)
    thresholds = oracle.thresholds(average, 4)
    nodes = oracle.single_linkage_nodes(oracle.class_distances(embeddings, labels), thresholds)
    classes = tree.labels
    miner = DynamicMarginMiner(tree, beta=beta, distance=LpDistance(power=power))
    table = miner.margins(classes.unsqueeze(1), classes)
    for a, n in itertools.permutations(range(len(classes)), 2):
        level = next(level for level in range(5) if nodes[a, level] == nodes[n, level])
        expected = beta + thresholds[level] ** (power / 2) - spreads[a] ** (power / 2)
        assert table[a, n] == pytest.approx(expected, abs=1e-6)
    batch = classes.repeat(2)  # what the loss asks for in a batch
    matrix = miner.margin_matrix(batch, batch, torch.float64)
    torch.testing.assert_close(matrix, miner.margins(batch.unsqueeze(1), batch))


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_margins_that_are_not_dynamic_are_constant(fitted, training):
    embeddings, labels = make_embeddings("clustered", [4] * 6, 5, seed=0)
    tree = ClassTree()
    if fitted:
        tree.fit_embeddings(torch.from_numpy(embeddings), labels)
    miner = DynamicMarginMiner(tree, beta=0.3, dynamic=False, distance=LpDistance()).train(training)
    pmls = TripletMarginMiner(0.3, distance=LpDistance())
    batch = torch.from_numpy(embeddings).float(), torch.from_numpy(labels)
    assert all(map(torch.equal, miner(*batch), pmls(*batch)))
    assert miner.margins(batch[1].unsqueeze(1), batch[1]).unique().tolist() == [0.3]
    expected = TripletMarginLoss(0.3, distance=LpDistance())(*batch)
    torch.testing.assert_close(HierarchicalTripletLoss(miner)(*batch), expected)


def test_miners_of_other_margins_are_told_apart():
    tree = ClassTree()
    miner = DynamicMarginMiner(tree)
    assert miner.has_margins_of(DynamicMarginMiner(tree, type_of_triplets="hard"))
    others = [{"beta": 0.2}, {"dynamic": False}, {"initial_margin": 0.1}, {"distance": LpDistance()}]
    assert not any(miner.has_margins_of(DynamicMarginMiner(tree, **other)) for other in others)
    assert not miner.has_margins_of(DynamicMarginMiner(ClassTree()))


def test_no_array_of_three_batch_sizes():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor):
                    self.size = max(self.size, value.numel())
            return result

    labels = torch.arange(64).repeat_interleave(4)
    embeddings = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    tree = ClassTree().fit_embeddings(embeddings, labels)
    with Largest() as largest:
        found = DynamicMarginMiner(tree, type_of_triplets="hard")(embeddings, labels)
    assert largest.size <= max(3 * len(found[0]), 256 * 256 * 17)  # the triplets, or B x B nodes at 17 levels
    assert largest.size < 256**3 / 4


def test_refusals():
    for distance in (CosineSimilarity(), SNRDistance(), LpDistance(p=1), LpDistance(power=3)):
        with pytest.raises(ValueError, match="distance must be LpDistance"):
            DynamicMarginMiner(ClassTree(), distance=distance)
    with pytest.raises(ValueError, match="normalize_embeddings=False"):
        DynamicMarginMiner(ClassTree(), distance=LpDistance(normalize_embeddings=False, power=2))
    with pytest.raises(ValueError, match="all, hard, semihard, easy, but it is 'soft'"):
        DynamicMarginMiner(ClassTree(), type_of_triplets="soft")
    with pytest.raises(TypeError, match="ClassTree"):
        DynamicMarginMiner(None)
    with pytest.raises(ValueError, match="beta"):
        DynamicMarginMiner(ClassTree(), beta=np.nan)
    with pytest.raises(ValueError, match="initial_margin"):
        DynamicMarginMiner(ClassTree(), initial_margin="0.2")
    with pytest.raises(ValueError, match="beta"):
        DynamicMarginMiner(ClassTree(), beta=True)
    with pytest.raises(ValueError, match="ref_labels are required"):
        DynamicMarginMiner(ClassTree())(torch.ones(2, 3), torch.tensor([1, 2]), torch.ones(2, 3))
    assert DynamicMarginMiner(ClassTree(), beta=np.float32(0.5)).beta == 0.5
    assert DynamicMarginMiner(ClassTree()).distance.power == 2
