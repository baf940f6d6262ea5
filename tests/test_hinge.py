"""The sums per anchor against loops over listed triplets, both ways of summing, and the reducers made from them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import reducers
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_triplets

from pml_htl.arithmetic import hinge
from pml_htl.arithmetic.classes import classes_of, pairs_of_classes
from pml_htl.arithmetic.reductions import HingeLosses, can_reduce, fill_stats, reduce_losses
from pml_htl.arithmetic.softmax import soft_losses_of_pairs
from pml_htl.arithmetic.triplets import Pairs, pairs_of_labels, pairs_of_tuple, triplets_of_tuple

pytestmark = pytest.mark.numerical

WAYS = {"comparing": 10**9, "sorting": -1}


@st.composite
def pair_tuples(draw, num_anchors, num_refs):
    """(a1, positives, a2, negatives) in any order, some pairs twice."""
    pairs = st.tuples(st.integers(0, num_anchors - 1), st.integers(0, num_refs - 1))
    found = [np.array(draw(st.lists(pairs, max_size=12))).reshape(-1, 2).astype(np.int64) for _ in range(2)]
    return tuple(torch.from_numpy(column) for array in found for column in array.T)


@st.composite
def batches(draw):
    """Distances and margins (B, R) float64 and the pairs: of skewed labels, or of a tuple."""
    num_anchors, num_refs = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        pairs = pairs_of_tuple(draw(pair_tuples(num_anchors, num_refs)), num_anchors, num_refs)
    else:
        labels, ref_labels = (torch.from_numpy(rng.geometric(0.4, size)) for size in (num_anchors, num_refs))
        own = draw(st.booleans())
        pairs = pairs_of_labels(labels, labels if own else ref_labels)
    shape = pairs.positives.shape
    distances = rng.integers(0, 4, shape) / 2 if draw(st.booleans()) else rng.uniform(0, 4, shape)  # with ties, or without
    margins = rng.choice([-0.3, 0.1, 0.25, 1.0], shape)
    return torch.from_numpy(distances), torch.from_numpy(margins), pairs


def listed(distances, margins, pairs):
    """(anchor, violation) of every triplet as often as it is there."""
    found = []
    for a, p, n in itertools.product(range(len(distances)), *(range(distances.shape[1]),) * 2):
        times = int(pairs.positives[a, p]) * int(pairs.negatives[a, n])
        found += [(a, distances[a, p] - (distances[a, n] - margins[a, n]))] * times
    return found


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    """Both ways of summing, in blocks of few rows."""
    monkeypatch.setattr(hinge, "MAX_COMPARISONS", WAYS[request.param])
    monkeypatch.setattr(hinge, "BLOCK_ELEMENTS", 20)


@given(batches(), st.sampled_from([(0.0, None), (0.0, 1.0), (0.5, None), (0.5, 2.0), (0.25, 0.25), (0.0, -1.0)]))
def test_sums_counts_and_gradients(batch, limits):
    distances, margins, pairs = batch
    floor, ceiling = limits
    distances.requires_grad_()
    losses, counts = hinge.hinge_sums(distances, margins, pairs, floor, ceiling)
    expected_losses, expected_counts = [[] for _ in distances], [0 for _ in distances]
    for a, violation in listed(distances, margins, pairs):
        if floor < violation.item() < (np.inf if ceiling is None else ceiling):
            expected_losses[a].append(violation)
            expected_counts[a] += 1
    expected = torch.stack(
        [torch.stack(some).sum() if some else torch.zeros((), dtype=torch.float64) for some in expected_losses]
    )
    assert counts.tolist() == expected_counts and counts.dtype == torch.int64
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    weights = torch.arange(1.0, len(distances) + 1, dtype=torch.float64)  # each anchor's gradient is its own
    (gradient,) = torch.autograd.grad(losses @ weights, distances)
    if expected.requires_grad:
        torch.testing.assert_close(gradient, torch.autograd.grad(expected @ weights, distances)[0], rtol=0, atol=1e-12)
    else:
        assert (gradient == 0).all()


@given(st.data())
def test_a_batch_by_its_classes_is_the_same_as_by_masks(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.integers(1, 12))
    balanced = np.arange(size) // data.draw(st.integers(1, 4))
    labels = torch.from_numpy(rng.permutation(balanced) if data.draw(st.booleans()) else rng.geometric(0.4, size)) * 7 - 3
    classes = classes_of(labels)
    by_class = torch.from_numpy(rng.choice([-0.3, 0.1, 0.25, 1.0], (len(classes.labels),) * 2))
    pairs, masked = pairs_of_classes(classes), pairs_of_labels(labels, labels)
    margins = by_class[classes.of_each][:, classes.of_each]
    with_ties = data.draw(st.booleans())
    values = torch.from_numpy(rng.integers(0, 4, (size, size)) / 2 if with_ties else rng.uniform(0, 4, (size, size)))
    results = []
    for given_margins, given_pairs in ((by_class, pairs), (margins, masked)):
        distances = values.clone().requires_grad_()
        losses, counts = hinge.hinge_sums(distances, given_margins, given_pairs, 0.0, 1.5)
        (gradient,) = torch.autograd.grad(losses @ torch.arange(1.0, size + 1, dtype=torch.float64), distances)
        soft, (anchors, positives) = soft_losses_of_pairs(values, given_margins, given_pairs, 0.3)
        sums = HingeLosses(values, given_margins, given_pairs, labels)
        results.append([losses, counts, gradient, soft, anchors, positives, sums.mean_margin(), *sums.margin_range()])
        results[-1] += [given_pairs.num_positives, given_pairs.num_negatives, given_pairs.num_triplets()]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12, equal_nan=True)


REDUCERS = {
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "avg-non-zero": reducers.AvgNonZeroReducer,
    "low": lambda **kwargs: reducers.ThresholdReducer(low=0.3, **kwargs),
    "negative-low": lambda **kwargs: reducers.ThresholdReducer(low=-1.0, **kwargs),
    "high": lambda **kwargs: reducers.ThresholdReducer(high=0.8, **kwargs),
    "low-high": lambda **kwargs: reducers.ThresholdReducer(low=0.2, high=1.3, **kwargs),
    "negative-high": lambda **kwargs: reducers.ThresholdReducer(high=-0.5, **kwargs),
    "class-weighted": lambda **kwargs: reducers.ClassWeightedReducer(torch.linspace(0.1, 2, 7), **kwargs),
}


@pytest.mark.parametrize("name", REDUCERS)
@given(batch=batches())
def test_reducers_from_sums_are_pmls_from_lists(name, batch):
    distances, margins, pairs = batch
    labels = torch.arange(len(distances)) % 7
    theirs, ours = (REDUCERS[name](collect_stats=True) for _ in range(2))
    found = listed(distances, margins, pairs)
    if found:
        anchors, violations = torch.tensor([a for a, _ in found]), torch.stack([v for _, v in found])
        losses, indices, kind = violations.relu(), (anchors, anchors, anchors), "triplet"
    else:
        losses, indices, kind = 0, None, "already_reduced"
    expected = theirs({"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}, torch.zeros(1, 1), labels)

    assert can_reduce(ours)
    sums = HingeLosses(distances, margins, pairs, labels)
    reduction = reduce_losses(ours, sums)
    ours(
        {"loss": {"losses": reduction.value, "indices": None, "reduction_type": "already_reduced"}},
        torch.zeros(1, 1),
        labels,
    )
    fill_stats(ours, sums, reduction)
    assert reduction.value.item() == pytest.approx(expected.item(), abs=1e-12)
    for stat in theirs._record_these_stats + ["num_above_high"] * hasattr(theirs, "num_above_high"):
        assert getattr(ours, stat) == getattr(theirs, stat), stat
    num_active, num_triplets = sums.active_triplets()
    share = int(num_active) / max(1, int(num_triplets))
    assert share == pytest.approx(np.mean([v > 0 for _, v in found]) if found else 0)
    if found:
        margins_of_triplets = [
            margins[a, n].item()
            for a, p, n in itertools.product(range(len(distances)), *(range(distances.shape[1]),) * 2)
            for _ in range(int(pairs.positives[a, p]) * int(pairs.negatives[a, n]))
        ]
        assert sums.mean_margin().item() == pytest.approx(np.mean(margins_of_triplets))
        assert [limit.item() for limit in sums.margin_range()] == [min(margins_of_triplets), max(margins_of_triplets)]


def test_a_subclass_of_a_reducer_gets_the_list():
    class Mine(reducers.MeanReducer):
        pass

    assert not can_reduce(Mine()) and not can_reduce(reducers.DoNothingReducer())


@given(st.data())
def test_pair_tuples_are_joined_as_pml_joins_them(data):
    num_anchors, num_refs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    indices_tuple = data.draw(pair_tuples(num_anchors, num_refs))
    found, expected = triplets_of_tuple(indices_tuple), convert_to_triplets(indices_tuple, torch.zeros(num_anchors))
    assert all(map(torch.equal, found, expected)) and all(index.dtype == torch.int64 for index in found)
    assert pairs_of_tuple(indices_tuple, num_anchors, num_refs).num_triplets() == len(expected[0])


def test_large_batches_lose_no_digits_in_float32():
    """Running sums over thousands of near-equal distances: the sorting way must not cancel."""
    generator = torch.Generator().manual_seed(0)
    distances = 1 + 1e-3 * torch.rand(4, 20_000, generator=generator)
    labels = torch.arange(20_000) % 10
    positives = labels[:4].unsqueeze(1) == labels
    numbers = positives.sum(dim=1), (~positives).sum(dim=1)
    pairs = Pairs(positives, ~positives, *numbers, None)
    margins = torch.full_like(distances, 1e-4)
    results = [hinge.hinge_sums(d, m, pairs)[0] for d, m in ((distances, margins), (distances.double(), margins.double()))]
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(batch=batches())
def test_both_float_types_have_a_gradient_of_their_own_type(dtype, batch):
    distances, margins, pairs = batch
    distances, margins = distances.to(dtype).requires_grad_(), margins.to(dtype)
    losses, _ = hinge.hinge_sums(distances, margins, pairs, floor=0.125)
    (gradient,) = torch.autograd.grad(losses.sum(), distances)
    assert losses.dtype == gradient.dtype == dtype
    exact = distances.detach().double().requires_grad_()
    expected, _ = hinge.hinge_sums(exact, margins.double(), pairs, floor=0.125)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-4)
    if dtype == torch.float64:
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), exact)[0])


def test_counts_are_whole_numbers_beyond_those_of_float32():
    distances = torch.full((1, 2 * 4097), 1.0)
    positives = (torch.arange(2 * 4097) % 2 == 0).unsqueeze(0)
    numbers = positives.sum(dim=1), (~positives).sum(dim=1)
    pairs = Pairs(positives, ~positives, *numbers, None)
    _, counts = hinge.hinge_sums(distances, torch.full_like(distances, 0.5), pairs)
    assert counts.tolist() == [4097 * 4097]
