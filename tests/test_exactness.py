"""Value and gradient of the loss in float64 against all triplets, made by broadcasting; and its second derivative."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import reducers
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.arithmetic import hinge
from pml_htl.arithmetic.distances import distance_matrix

pytestmark = pytest.mark.numerical

NUM_CLASSES = 12
LOW, HIGH = 0.137, 0.613
CLASS_WEIGHTS = torch.linspace(0.1, 2, NUM_CLASSES, dtype=torch.float64)
WAYS = {"comparing": 10**9, "searching": -1}


def mean_or_zero(losses):
    return losses.sum() / max(1, len(losses))


# How each reducer is made, and what it makes of the losses of all triplets and the labels of their anchors.
REDUCERS = {
    "avg-non-zero": (reducers.AvgNonZeroReducer, lambda losses, _: mean_or_zero(losses[losses > 0])),
    "mean": (reducers.MeanReducer, lambda losses, _: mean_or_zero(losses)),
    "sum": (reducers.SumReducer, lambda losses, _: losses.sum()),
    "low": (lambda: reducers.ThresholdReducer(low=LOW), lambda losses, _: mean_or_zero(losses[losses > LOW])),
    "high": (lambda: reducers.ThresholdReducer(high=HIGH), lambda losses, _: mean_or_zero(losses[losses < HIGH])),
    "low-high": (
        lambda: reducers.ThresholdReducer(low=LOW, high=HIGH),
        lambda losses, _: mean_or_zero(losses[(losses > LOW) & (losses < HIGH)]),
    ),
    "class-weighted": (
        lambda: reducers.ClassWeightedReducer(CLASS_WEIGHTS),
        lambda losses, labels: mean_or_zero(losses * CLASS_WEIGHTS[labels]),
    ),
}


def make_loss(tree, power, reducer=None):
    return HierarchicalTripletLoss(DynamicMarginMiner(tree, distance=LpDistance(power=power)), reducer=reducer)


def fitted_tree(dimensions, rng):
    """Of classes some of which are near each other."""
    labels = np.repeat(np.arange(NUM_CLASSES), 3)
    centres = rng.normal(size=(4, dimensions))[rng.integers(4, size=NUM_CLASSES)]
    centres = centres + 0.5 * rng.normal(size=(NUM_CLASSES, dimensions))
    samples = centres[labels] + 0.2 * rng.normal(size=(len(labels), dimensions))
    return ClassTree().fit_embeddings(torch.from_numpy(samples), labels)


@st.composite
def batches(draw):
    """A tree, and embeddings with labels, some samples at the same point: (B, D), (B,), and (R, D), (R,) or nothing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dimensions, num_points = draw(st.integers(3, 8)), draw(st.integers(2, 60))
    points = rng.normal(size=(num_points, dimensions))
    classes = rng.permutation(NUM_CLASSES)

    def samples(size):
        chosen = points[rng.integers(num_points, size=size)]
        lengths = 2.0 ** rng.integers(-2, 3, size=(size, 1))  # powers of two, so that the unit vectors are the same
        labels = classes[rng.geometric(0.3, size).clip(max=NUM_CLASSES) - 1]  # some classes often, some once
        return torch.from_numpy(chosen * lengths), torch.from_numpy(labels)

    sizes = st.one_of(st.integers(2, 25), st.integers(30, 60))
    own = samples(draw(sizes))
    ref = samples(draw(sizes)) if draw(st.booleans()) else (None, None)
    return fitted_tree(dimensions, rng) if draw(st.booleans()) else ClassTree(), *own, *ref


def distances_by_broadcasting(embeddings, ref_emb, power):
    """(B, R); the gradient of a plain distance of zero is zero."""
    query, ref = (points / points.norm(dim=1, keepdim=True) for points in (embeddings, ref_emb))
    squared = (query.unsqueeze(1) - ref).square().sum(dim=2)
    if power == 2:
        return squared
    # What is nearly zero has lost its digits in any formula that multiplies.
    assume(((squared == 0) | (squared > 1e-5)).all())
    return torch.where(squared > 0, squared, 1).sqrt().where(squared > 0, 0)


def violations_of_all_triplets(tree, power, embeddings, labels, ref_emb, ref_labels):
    """(T,), and the labels of the anchors (T,)."""
    own = ref_emb is None
    ref_emb, ref_labels = (embeddings, labels) if own else (ref_emb, ref_labels)
    distances = distances_by_broadcasting(embeddings, ref_emb, power)
    margins = make_loss(tree, power).miner.margins(labels.unsqueeze(1), ref_labels)
    same = labels.unsqueeze(1) == ref_labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool) if own else same
    violations = distances.unsqueeze(2) - distances.unsqueeze(1) + margins.unsqueeze(1)  # anchor, positive, negative
    there = positive.unsqueeze(2) & ~same.unsqueeze(1)
    return violations[there], labels.view(-1, 1, 1).expand(there.shape)[there]


def leaves(embeddings, ref_emb):
    return [None if points is None else points.clone().requires_grad_() for points in (embeddings, ref_emb)]


def gradients(value, points):
    """Of those points that there are; zero where the value does not depend on them."""
    points = [some for some in points if some is not None]
    return torch.autograd.grad(value, points, retain_graph=True, materialize_grads=True)


def assert_near(found, expected, tolerance):
    """Relative to the largest one, if that is above 1."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1, other.detach().abs().max().item()))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=100)
@given(batch=batches())
def test_value_and_gradient_are_those_of_all_triplets(way, power, batch):
    tree, embeddings, labels, ref_emb, ref_labels = batch
    expected_points = leaves(embeddings, ref_emb)
    violations, anchor_labels = violations_of_all_triplets(
        tree, power, expected_points[0], labels, expected_points[1], ref_labels
    )
    for limit in (0, LOW, HIGH):  # nearer than that rounding decides what counts
        assume(((violations - limit).abs() > 1e-9).all())
    for make_reducer, reduce in REDUCERS.values():
        expected = reduce(violations.relu(), anchor_labels)
        points = leaves(embeddings, ref_emb)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hinge, "MAX_COMPARISONS", WAYS[way])
            patch.setattr(hinge, "BLOCK_ELEMENTS", 200)
            value = make_loss(tree, power, make_reducer())(points[0], labels, ref_emb=points[1], ref_labels=ref_labels)
        assert_near([value], [expected], 1e-9)
        assert_near(gradients(value, points), gradients(expected, expected_points), 1e-9)


@pytest.mark.parametrize("power", [1, 2])
@settings(max_examples=100)
@given(batch=batches(), name=st.sampled_from(list(REDUCERS)))
def test_with_a_reducer_that_needs_the_list_it_is_the_same(power, batch, name):
    tree, embeddings, labels, ref_emb, ref_labels = batch
    violations, _ = violations_of_all_triplets(tree, power, embeddings, labels, ref_emb, ref_labels)
    for limit in (0, LOW, HIGH):
        assume(((violations - limit).abs() > 1e-9).all())
    results = []
    for listed in (False, True):
        reducer = REDUCERS[name][0]()
        if listed:
            reducer.__class__ = type("Own", (type(reducer),), {})
        loss, points = make_loss(tree, power, reducer), leaves(embeddings, ref_emb)
        assert loss._needs_list(None) == listed
        value = loss(points[0], labels, ref_emb=points[1], ref_labels=ref_labels)
        results.append([value, *gradients(value, points)])
    assert_near(results[0], results[1], 1e-9)


def second_derivatives(loss, weigh, embeddings, labels, ref_emb, ref_labels):
    """Gradients of the squared norm of the gradient."""
    points = leaves(embeddings, ref_emb)
    value = weigh(loss(points[0], labels, ref_emb=points[1], ref_labels=ref_labels))
    points = [some for some in points if some is not None]
    first = torch.autograd.grad(value, points, create_graph=True)
    return [*first, *torch.autograd.grad(sum(part.square().sum() for part in first), points)]


def assert_second_derivatives_are_pmls(power, with_ref, weigh):
    generator = torch.Generator().manual_seed(0)
    # More than 25 samples: for fewer torch.cdist, which PML calls, has no second derivative.
    embeddings, ref_emb = (torch.randn(size, 6, generator=generator, dtype=torch.float64) for size in (40, 33))
    labels, ref_labels = torch.arange(40) % 5, torch.arange(33) % 7
    ref = (ref_emb, ref_labels) if with_ref else (None, None)
    kwargs = {"distance": LpDistance(power=power)}
    ours = HierarchicalTripletLoss(
        DynamicMarginMiner(ClassTree(), initial_margin=0.3, **kwargs), reducer=reducers.SumReducer()
    )
    pmls = TripletMarginLoss(margin=0.3, reducer=reducers.SumReducer(), **kwargs)
    found, expected = (second_derivatives(loss, weigh, embeddings, labels, *ref) for loss in (ours, pmls))
    assert all(part.abs().max() > 1 for part in expected)
    assert_near(found, expected, 1e-8)


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("power", [1, 2])
def test_the_second_derivative_is_pmls(power, with_ref):
    assert_second_derivatives_are_pmls(power, with_ref, lambda value: value)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("with_ref", [False, True])
def test_the_second_derivative_of_a_function_of_the_loss_is_pmls(power, with_ref):
    """Such as a learned weight: then the gradient that comes to the loss has a gradient itself."""
    assert_second_derivatives_are_pmls(power, with_ref, torch.square)


@pytest.mark.parametrize("power", [1, 2])
def test_distances_can_be_differentiated_twice(power):
    """As a gradient penalty and MAML need; with a reference set, and without."""
    distance = LpDistance(power=power)
    query, ref = (
        torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).requires_grad_()
        for size in (6, 5)
    )
    assert torch.autograd.gradgradcheck(lambda query, ref: distance_matrix(distance, query, ref), (query, ref))
    # Without the diagonal: a plain distance has no derivative at zero.
    assert torch.autograd.gradgradcheck(lambda query: distance_matrix(distance, query, query).triu(1), query)
