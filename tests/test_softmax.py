"""The smooth maximum over the negatives (`temperature`) against a loop over its definition, and against PML's NTXentLoss."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning import reducers
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import NTXentLoss
from pytorch_metric_learning.miners import TripletMarginMiner

from pml_htl import HTL, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.losses import CrossBatchMemory

from . import oracle
from .examples import are_apart, labelled_embeddings, make_embeddings

pytestmark = pytest.mark.numerical

EXAMPLES = labelled_embeddings(kinds=["random", "clustered"])


def make_loss(tree, power=1, temperature=0.1, **kwargs):
    miner = DynamicMarginMiner(tree, distance=LpDistance(power=power))
    return HierarchicalTripletLoss(miner, temperature=temperature, **kwargs)


def by_definition(loss, embeddings, labels, found, temperature, power, ref_emb=None, ref_labels=None, swap=False):
    """The mean over (anchor, positive) of the smooth maximum, from triplets (a, p, n) one by one."""
    others = labels if ref_labels is None else ref_labels
    violations = {}
    margins = {(a, n): float(loss.miner.margins(int(labels[a]), int(others[n]))) for a, n in {(a, n) for a, _, n in found}}
    # The oracle's losses, with margins so large that max(0, .) does nothing.
    far = oracle.losses(embeddings, found, lambda a, n: margins[a, n] + 10, power, swap=swap, ref_emb=ref_emb)
    for (a, p, _), value in zip(found, far - 10, strict=True):
        violations.setdefault((a, p), []).append(value)
    losses = [temperature * torch.log(1 + torch.exp(torch.stack(vs) / temperature).sum()) for vs in violations.values()]
    return torch.stack(losses)


def compare(value, expected, embeddings):
    gradients = [torch.autograd.grad(x, embeddings, retain_graph=True)[0] for x in (value, expected)]
    torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-8)


@given(EXAMPLES, st.sampled_from([1, 2]), st.sampled_from([0.02, 0.1, 1.0]), st.booleans())
def test_value_and_gradient(example, power, temperature, swap):
    embeddings, labels = example
    assume(power == 2 or are_apart(embeddings))
    tree = ClassTree(4).fit_embeddings(torch.from_numpy(embeddings), labels)
    found = oracle.triplets(labels)
    leaf = torch.from_numpy(embeddings).requires_grad_()
    loss = make_loss(tree, power, temperature, reducer=reducers.MeanReducer(), swap=swap)
    value = loss(leaf, torch.from_numpy(labels))
    if not found:
        assert value == 0
        value.backward()
        return
    compare(value, by_definition(loss, leaf, labels, found, temperature, power, swap=swap).mean(), leaf)


@given(EXAMPLES, st.integers(0, 2**32 - 1))
def test_tuples_and_references(example, seed):
    """Pair tuples with pairs that are there twice, lists of triplets, and reference embeddings."""
    embeddings, labels = example
    rng = np.random.default_rng(seed)
    tree = ClassTree(4).fit_embeddings(torch.from_numpy(embeddings), labels)
    # Not the same points: at a plain distance of zero the definition has no gradient.
    ref_emb = oracle.unit(embeddings[::-1][:6] + 0.1 * rng.normal(size=embeddings[:6].shape))
    assume(np.linalg.norm(embeddings[:, np.newaxis] - ref_emb, axis=2).min() > 3e-3)
    ref_labels = labels[::-1][:6].copy()
    found = oracle.triplets(labels, ref_labels)
    if not found:
        return
    leaf = torch.from_numpy(embeddings).requires_grad_()
    tensors = [torch.from_numpy(array) for array in (labels, ref_emb, ref_labels)]
    loss = make_loss(tree, reducer=reducers.SumReducer())
    expected = by_definition(loss, leaf, labels, found, 0.1, 1, tensors[1], ref_labels)
    compare(loss(leaf, tensors[0], None, *tensors[1:]), expected.sum(), leaf)

    chosen = [found[place] for place in rng.integers(len(found), size=5)]  # maybe one twice
    mined = tuple(torch.tensor(index) for index in zip(*chosen, strict=True))
    expected = by_definition(loss, leaf, labels, chosen, 0.1, 1, tensors[1], ref_labels)
    compare(loss(leaf, tensors[0], mined, *tensors[1:]), expected.sum(), leaf)

    positives = [(a, p) for a, p, _ in chosen]
    negatives = [(a, n) for a, _, n in chosen]
    pairs = tuple(torch.tensor(index) for index in (*zip(*positives, strict=True), *zip(*negatives, strict=True)))
    total = 0.0
    for a, p in positives:  # a pair that is there twice has its loss twice, with its negatives as often as they are there
        triplets = [(a, p, n) for b, n in negatives if b == a]
        total = total + by_definition(loss, leaf, labels, triplets, 0.1, 1, tensors[1], ref_labels).sum()
    compare(loss(leaf, tensors[0], pairs, *tensors[1:]), total, leaf)


def batch(dtype=torch.float64):
    embeddings, labels = make_embeddings("clustered", [4] * 7, 6, seed=3)
    return torch.from_numpy(embeddings).to(dtype).requires_grad_(), torch.from_numpy(labels)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_without_margin_it_is_pmls_ntxent(temperature):
    embeddings, labels = batch()
    tree = ClassTree().fit_embeddings(embeddings.detach(), labels)
    miner = DynamicMarginMiner(tree, beta=0, dynamic=False)
    loss = HierarchicalTripletLoss(miner, temperature=temperature, reducer=reducers.MeanReducer())
    compare(loss(embeddings, labels), temperature * NTXentLoss(temperature / 2)(embeddings, labels), embeddings)


def test_a_low_temperature_is_the_hardest_negative():
    embeddings, labels = batch()
    tree = ClassTree().fit_embeddings(embeddings.detach(), labels)
    loss = make_loss(tree, temperature=1e-6, reducer=reducers.SumReducer())
    found = oracle.triplets(labels.numpy())
    hinges = oracle.losses(embeddings, found, lambda a, n: float(loss.miner.margins(labels[a], labels[n])), power=1)
    hardest = {}
    for (a, p, _), value in zip(found, hinges.tolist(), strict=True):
        hardest[a, p] = max(value, hardest.get((a, p), 0.0))
    assert loss(embeddings, labels).item() == pytest.approx(sum(hardest.values()), abs=1e-3)


def test_reducers_of_pairs_work_and_statistics_are_recorded():
    embeddings, labels = batch()
    tree = ClassTree().fit_embeddings(embeddings.detach(), labels)
    found = oracle.triplets(labels.numpy())
    losses = by_definition(make_loss(tree), embeddings, labels.numpy(), found, 0.1, 1)
    pairs = tuple(torch.tensor(index) for index in zip(*dict.fromkeys((a, p) for a, p, _ in found), strict=True))
    listed = {"loss": {"losses": losses, "indices": pairs, "reduction_type": "pos_pair"}}
    for make in (
        reducers.AvgNonZeroReducer,
        reducers.PerAnchorReducer,
        reducers.MeanReducer,
        lambda: reducers.ThresholdReducer(low=0.3),
    ):
        loss = make_loss(tree, reducer=make(), collect_stats=True)
        compare(loss(embeddings, labels), make()(listed, embeddings, labels), embeddings)
        assert 0 < loss.active_share <= 1 and loss.min_margin <= loss.margin <= loss.max_margin
    violated = DynamicMarginMiner(tree, distance=LpDistance())(embeddings.detach(), labels)
    assert loss.active_share == pytest.approx(len(violated[0]) / len(found))


def test_it_goes_with_mined_triplets_a_memory_and_the_recipe():
    embeddings, labels = batch(torch.float32)
    htl = HTL(labels, num_anchors=2, neighborhood_size=2, samples_per_class=2, temperature=0.05)
    mined = TripletMarginMiner(0.2)(embeddings, labels)
    htl.loss(embeddings, labels, mined).backward()
    assert embeddings.grad.abs().sum() > 0
    memory = CrossBatchMemory(htl.loss, embeddings.shape[1], memory_size=100)
    for _ in range(3):
        assert memory(embeddings, labels) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(htl.loss(embeddings.bfloat16(), labels))
    assert make_loss(ClassTree())(embeddings[:1], labels[:1]) == 0  # no triplet
    random = make_loss(ClassTree(), triplets_per_anchor=5)(embeddings, labels)
    assert random > 0


def test_far_violations_do_not_overflow():
    embeddings, labels = batch(torch.float32)
    loss = make_loss(ClassTree(), temperature=1e-3)
    value = loss(embeddings, labels)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(embeddings.grad).all()


def test_refusals():
    for temperature in (0, -1, float("inf"), float("nan"), "warm"):
        with pytest.raises(ValueError, match="temperature must be a number above 0, or None"):
            make_loss(ClassTree(), temperature=temperature)
    with pytest.raises(ValueError, match="two ways to smooth"):
        make_loss(ClassTree(), smooth_loss=True)
