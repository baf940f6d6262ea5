"""What PML's tests ask of `TripletMarginLoss`, asked of `HierarchicalTripletLoss` at a constant margin."""

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import MeanReducer

from .. import oracle
from .by_hand import losses_by_hand, mean_of_positive, triplets_of
from .shared import (
    MARGIN,
    assert_close,
    each_dtype,
    each_power,
    each_tree,
    loss_with,
    on_a_circle,
    random_batch,
)

pytestmark = pytest.mark.numerical

ANGLES = [0, 20, 40, 60, 80]
LABELS = [0, 0, 1, 1, 2]
REDUCERS = {"default": (lambda: None, mean_of_positive), "mean": (MeanReducer, torch.mean)}
each_reducer = pytest.mark.parametrize("reducer", REDUCERS)
each_option = pytest.mark.parametrize("option", ["plain", "smooth", "swap"])


@each_dtype
@each_tree
@each_power
@each_reducer
@each_option
def test_values_and_gradients(dtype, tree, power, reducer, option, device):
    make, reduce = REDUCERS[reducer]
    smooth, swap = option == "smooth", option == "swap"
    triplets = oracle.triplets(LABELS)
    assert len(triplets) == 12
    embeddings, others = on_a_circle(ANGLES, dtype, device), on_a_circle(ANGLES, dtype, device)
    loss = loss_with(tree, power=power, reducer=make(), smooth_loss=smooth, swap=swap)(embeddings, torch.tensor(LABELS))
    expected = reduce(losses_by_hand(others, others, triplets, power=power, smooth=smooth, swap=swap))
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert others.grad.abs().max() > 1e-3
    assert_close(embeddings.grad, others.grad)


@each_dtype
@each_tree
@each_power
@each_reducer
@pytest.mark.parametrize("smooth", [False, True])
def test_reference_embeddings_and_their_gradients(dtype, tree, power, reducer, smooth, device):
    make, reduce = REDUCERS[reducer]
    batches = random_batch(7, dtype, device), random_batch(9, dtype, device, seed=1)
    labels, ref_labels = (labels for _, labels in batches)
    leaves, others = ([embeddings.clone().requires_grad_() for embeddings, _ in batches] for _ in range(2))
    loss = loss_with(tree, power=power, reducer=make(), smooth_loss=smooth)(
        leaves[0], labels, ref_emb=leaves[1], ref_labels=ref_labels
    )
    triplets = oracle.triplets(labels.tolist(), ref_labels.tolist())
    expected = reduce(losses_by_hand(*others, triplets, power=power, smooth=smooth))
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for leaf, other in zip(leaves, others, strict=True):
        assert other.grad.abs().max() > 1e-3
        assert_close(leaf.grad, other.grad)


@each_dtype
@each_tree
@each_reducer
def test_power_two_is_twice_the_cosine_loss(dtype, tree, reducer, device):
    make, reduce = REDUCERS[reducer]  # |x - y|^2 = 2 - 2 cos(x, y), so margins double too
    embeddings, labels = on_a_circle(ANGLES, dtype, device), torch.tensor(LABELS)
    loss = loss_with(tree, margin=2 * MARGIN, reducer=make())(embeddings, labels)
    units = torch.nn.functional.normalize(embeddings)
    similar = [(units[a] @ units[n] - units[a] @ units[p] + MARGIN).clamp(min=0) for a, p, n in oracle.triplets(LABELS)]
    assert_close(loss, 2 * reduce(torch.stack(similar)))
    pmls = TripletMarginLoss(MARGIN, distance=CosineSimilarity(), reducer=make())
    assert_close(loss, 2 * pmls(embeddings, labels))


@each_dtype
@each_tree
@each_reducer
@each_option
def test_no_valid_triplets(dtype, tree, reducer, option, device):
    loss = loss_with(tree, reducer=REDUCERS[reducer][0](), smooth_loss=option == "smooth", swap=option == "swap")
    for labels in ([0, 1, 2, 3, 4], [0, 0, 0, 0, 0]):
        embeddings = on_a_circle(ANGLES, dtype, device)
        value = loss(embeddings, torch.tensor(labels))
        assert value == 0 and value.dtype == dtype
        value.backward()
        assert (embeddings.grad == 0).all()


@each_dtype
@each_tree
def test_triplets_without_loss_have_no_gradient(dtype, tree, device):
    embeddings = on_a_circle(ANGLES, dtype, device)
    value = loss_with(tree, margin=-5.0)(embeddings, torch.tensor(LABELS))
    value.backward()
    assert value == 0 and (embeddings.grad == 0).all()


@each_dtype
@each_tree
def test_stats(dtype, tree, device):
    for collects in (False, True):
        loss = loss_with(tree, collect_stats=collects)
        loss.distance.collect_stats = loss.reducer.collect_stats = collects
        loss(on_a_circle(ANGLES, dtype, device), torch.tensor(LABELS))
        assert float(loss.margin) == pytest.approx(MARGIN, abs=1e-6) and "margin" in loss._record_these
        names = (loss.reducer, "num_past_filter"), (loss.reducer, "losses_size"), (loss.distance, "initial_avg_query_norm")
        found = [getattr(module, name, None) or None for module, name in names]
        points = on_a_circle(ANGLES, torch.float64, device)
        num_positive = (losses_by_hand(points, points, oracle.triplets(LABELS)) > 0).sum().item()
        assert 0 < num_positive < 12
        assert found == ([num_positive, 12, pytest.approx(3)] if collects else [None] * 3)


@each_dtype
@each_tree
def test_triplets_and_pairs_from_outside(dtype, tree, device):
    labels = torch.tensor(LABELS)
    for miner in (MultiSimilarityMiner(), TripletMarginMiner(0.5, "semihard")):
        embeddings = on_a_circle([0, 20, 45, 65, 80], dtype, device)  # semihard negatives a little farther than positives
        indices_tuple = miner(embeddings, labels)
        expected = mean_of_positive(losses_by_hand(embeddings, embeddings, triplets_of(indices_tuple)))
        for refs in ({}, {"ref_emb": embeddings, "ref_labels": labels}):
            assert_close(loss_with(tree)(embeddings, labels, indices_tuple, **refs), expected)
        assert expected > 0
        with pytest.raises(ValueError, match="labels are required"):  # PML's loss takes tuples alone
            loss_with(tree)(embeddings, indices_tuple=indices_tuple)
    with pytest.raises(ValueError):
        loss_with(tree)(embeddings)
