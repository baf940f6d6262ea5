"""Fits of many classes, which make no C x C matrix, against scipy on that matrix; and how often samples are drawn."""

import itertools
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.cluster.hierarchy as hierarchy
import scipy.sparse as sparse
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import squareform

from pml_htl import AnchorNeighborSampler, ClassStatistics, ClassTree
from pml_htl.distributed import Ranks
from pml_htl.tree import coarse, halves, merging, nearest, spanning
from pml_htl.tree.points import class_points

from .processes import environment
from .rounding import tolerance

pytestmark = pytest.mark.numerical

ROUNDING = tolerance(torch.float32)  # what products in float32 may do to a distance
searches = pytest.mark.parametrize("search", ["halves", "rows"])  # of a CPU, and of a GPU


@contextmanager
def many_classes(search="halves"):
    """Few classes take the path of many, with lists as short as the tree's, in blocks so small that each loop runs on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "MAX_MATRIX_CLASSES", 1)
        patch.setattr(merging, "MIN_NEIGHBORS", 1)
        patch.setattr(nearest, "ROWS", 7)
        patch.setattr(nearest, "COLUMNS", 5)
        patch.setattr(coarse, "GROUP", 4)
        patch.setattr(coarse, "TILE", 9)
        patch.setattr(halves, "ROWS", 6)
        patch.setattr(halves, "MERGED", 11)
        patch.setattr(spanning, "BLOCK", (5, 3))
        patch.setattr(spanning, "MAX_BRIDGES", 1)
        if search == "rows":
            patch.setattr(nearest, "search_by_halves", nearest.search_by_rows)
        yield patch


def class_centres(kind, num_classes, dimensions, rng):
    if kind == "groups":  # far from each other and tight: their nearest classes lead from none to another
        groups = rng.normal(size=(rng.integers(2, 6), dimensions))
        return groups[rng.integers(len(groups), size=num_classes)] + 0.01 * rng.normal(size=(num_classes, dimensions))
    if kind == "chain":
        angles = np.linspace(0, rng.uniform(0.5, 5), num_classes) + rng.choice([0, 1e-3]) * rng.normal(size=num_classes)
        return np.stack([np.cos(angles), np.sin(angles)] + [np.zeros(num_classes)] * (dimensions - 2), axis=1)
    centres = rng.normal(size=(num_classes, dimensions))
    if kind == "duplicates":
        return centres[rng.integers(max(2, num_classes // 10), size=num_classes)]
    return centres


@st.composite
def statistics_of_classes(draw, kinds=("uniform", "groups", "chain", "duplicates"), max_classes=120):
    """Class statistics of any kind of classes, of even or of skewed sizes, with or without embeddings of all zeros."""
    num_classes, dimensions = draw(st.integers(3, max_classes)), draw(st.integers(2, 12))
    kind, skewed, zeros = draw(st.sampled_from(kinds)), draw(st.booleans()), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = rng.geometric(0.4, num_classes) if skewed else np.full(num_classes, 3)
    sizes[0] = max(2, sizes[0])  # one class must have a spread
    noise = draw(st.sampled_from([0, 0.002, 0.1]))
    samples = np.repeat(class_centres(kind, num_classes, dimensions, rng), sizes, axis=0)
    samples = samples + noise * rng.normal(size=samples.shape)
    if zeros:
        samples[rng.random(len(samples)) < 0.3] = 0
    labels = np.repeat(np.arange(num_classes), sizes)
    return ClassStatistics(labels, dimensions).update(torch.from_numpy(samples), labels)


def assert_is_the_tree_of_the_matrix(tree, statistics):
    """Merges, nodes and neighbours are those that scipy and numpy find in the float64 matrix of all distances."""
    distances = statistics.squared_distances().numpy()
    num_classes = len(distances)
    merges = hierarchy.linkage(squareform(distances, checks=False), "single")
    edges, heights = tree.merge_edges.numpy(), tree.merge_heights.numpy()
    assert edges.shape == (num_classes - 1, 2) and (np.diff(heights) >= 0).all()
    np.testing.assert_allclose(heights, np.sort(merges[:, 2]), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(heights, distances[tuple(edges.T)], rtol=0, atol=1e-12)
    graph = sparse.coo_array((np.ones(len(edges)), tuple(edges.T)), shape=distances.shape)
    assert sparse.csgraph.connected_components(graph, directed=False)[0] == 1

    for level, threshold in enumerate(tree.thresholds.tolist()[:-1]):
        if np.abs(merges[:, 2] - threshold).min() > ROUNDING:  # nearer than that rounding decides
            groups = hierarchy.fcluster(merges, threshold, criterion="distance")
            smallest = [np.flatnonzero(groups == group)[0] for group in range(groups.max() + 1) if group in groups]
            np.testing.assert_array_equal(tree.nodes[:, level], np.array([-1, *smallest])[groups])
    assert (tree.nodes[:, -1] == 0).all()

    found = tree.nearest_classes.numpy()
    np.fill_diagonal(distances, np.inf)
    assert all(len(set(row)) == len(row) for row in found.tolist())
    assert (found != np.arange(num_classes)[:, np.newaxis]).all()
    found_distances = np.take_along_axis(distances, found, axis=1)
    expected = np.sort(distances, axis=1)[:, : found.shape[1]]
    np.testing.assert_allclose(found_distances, expected, rtol=0, atol=ROUNDING)
    assert (np.diff(found_distances, axis=1) >= -ROUNDING).all()


@searches
@given(statistics=statistics_of_classes(), k=st.integers(1, 8))
def test_listed_distances_are_those_of_the_matrix(search, statistics, k):
    k = min(k, len(statistics.labels) - 1)
    with many_classes(search):
        points = class_points(statistics, torch.device("cpu"))
        found, found_distances = nearest.nearest_classes(points, k, Ranks.alone())
    assert found.shape == (len(statistics.labels), k)
    expected = np.take_along_axis(statistics.squared_distances().numpy(), found, axis=1)
    np.testing.assert_allclose(found_distances, expected, rtol=0, atol=ROUNDING)
    assert (found_distances >= 0).all()


@searches
@given(statistics=statistics_of_classes(), k=st.integers(1, 8), num_levels=st.sampled_from([4, 16, 64]))
@pytest.mark.filterwarnings("ignore:the embeddings have collapsed")
def test_without_the_matrix_it_is_the_tree_of_the_matrix(search, statistics, k, num_levels):
    with many_classes(search):
        tree = ClassTree(num_levels, max_neighbors=k).fit(statistics)
    assert tree.nearest_classes.shape == (len(statistics.labels), min(k, len(statistics.labels) - 1))
    assert_is_the_tree_of_the_matrix(tree, statistics)


def clustered_statistics(num_classes, dimensions, num_groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(num_groups, dimensions, generator=generator)
    centres = groups[torch.randint(num_groups, (num_classes,), generator=generator)]
    centres = centres + 0.2 * torch.randn(num_classes, dimensions, generator=generator)
    labels = torch.arange(num_classes).repeat_interleave(3)
    samples = centres[labels] + 0.05 * torch.randn(len(labels), dimensions, generator=generator)
    return ClassStatistics(labels, dimensions).update(samples, labels)


def test_5000_classes_are_fitted_without_the_matrix(monkeypatch):
    statistics = clustered_statistics(5000, 32, num_groups=20)
    with monkeypatch.context() as patch:
        patch.setattr(ClassStatistics, "squared_distances", lambda *_: pytest.fail("this is the matrix"))
        tree = ClassTree().fit(statistics)
    counts = [tree.nodes[:, level].unique().numel() for level in range(17)]
    assert len(set(counts)) > 3 and counts[0] > 1000  # or the nodes would say little
    assert_is_the_tree_of_the_matrix(tree, statistics)


@searches
def test_only_classes_that_may_have_a_shorter_edge_are_compared(search):
    """Two tight groups with one class between them, and lonely classes around, whose lists reach farther than the gap."""
    rng = np.random.default_rng(0)
    axes = np.eye(40)
    left, right = (axes[0] + sign * 0.2 * axes[1] + 0.001 * rng.normal(size=(6, 40)) for sign in (-1, 1))
    centres = np.concatenate([left, right, axes[[0]] + 0.001, axes[0] + axes[2:]])
    labels = np.arange(len(centres)).repeat(2)
    samples = centres[labels] + 2e-3 * rng.normal(size=(len(labels), 40))
    statistics = ClassStatistics(labels, 40).update(torch.from_numpy(samples), labels)
    compared = []
    largest_scores = spanning._largest_scores

    def note(base, queries):
        compared.append((len(base), len(queries)))
        return largest_scores(base, queries)

    with many_classes(search) as patch:
        patch.setattr(spanning, "_largest_scores", note)
        tree = ClassTree(max_neighbors=3).fit(statistics)
    assert sum(rows * columns for rows, columns in compared) == 6 * 7  # the one between is of one of the groups
    assert_is_the_tree_of_the_matrix(tree, statistics)


@pytest.mark.parametrize("linkage", ["average", "complete"])
def test_other_linkages_take_the_matrix_for_any_number_of_classes(linkage):
    statistics = clustered_statistics(60, 8, num_groups=5)
    expected = ClassTree(linkage=linkage, max_neighbors=5).fit(statistics).state_dict()
    with many_classes() as patch:
        patch.setattr(merging, "nearest_classes", lambda *_: pytest.fail("this is the search for lists"))
        found = ClassTree(linkage=linkage, max_neighbors=5).fit(statistics).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# 30,000 classes: their matrix would take 7 GiB.
SCRIPT = """
import torch
from pml_htl import ClassStatistics, ClassTree
from tests.peak import peak

NUM_CLASSES, DIMENSIONS = 30_000, 16
torch.manual_seed(0)
centres = torch.randn(300, DIMENSIONS)[torch.randint(300, (NUM_CLASSES,))] + 0.1 * torch.randn(NUM_CLASSES, DIMENSIONS)
labels = torch.arange(NUM_CLASSES).repeat(2)
samples = centres[labels] + 0.02 * torch.randn(len(labels), DIMENSIONS)
statistics = ClassStatistics(labels, DIMENSIONS).update(samples, labels)
# A small fit first, so that what libraries take for themselves does not count.
small = labels < 2500
ClassTree(max_neighbors=16).fit(ClassStatistics(labels[small], DIMENSIONS).update(samples[small], labels[small]))

before = peak()
tree = ClassTree(max_neighbors=16).fit(statistics)
assert tree.nodes.shape == (NUM_CLASSES, 17)
print((peak() - before) / 2**20)
"""


@pytest.mark.slow
def test_30000_classes_take_little_memory():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert 5 < float(done.stdout) < 400, done.stdout  # MiB; and that it was measured at all


@pytest.fixture
def shortened_products():
    """The user's wish for quick products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield "medium"
    torch.set_float32_matmul_precision(before)


@searches
def test_products_of_the_fit_are_not_shortened(search, shortened_products):
    statistics = clustered_statistics(200, 8, num_groups=8)
    torch.set_float32_matmul_precision("highest")
    with many_classes(search):
        expected = ClassTree(max_neighbors=2).fit(statistics).state_dict()
    torch.set_float32_matmul_precision(shortened_products)
    precisions = set()
    largest_scores = spanning._largest_scores

    def note(*points):
        precisions.add(torch.get_float32_matmul_precision())  # not every CPU has shortened products
        return largest_scores(*points)

    with many_classes(search) as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(spanning, "_largest_scores", note)
        found = ClassTree(max_neighbors=2).fit(statistics).state_dict()
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert precisions == {"highest"} and torch.get_float32_matmul_precision() == shortened_products


@pytest.mark.parametrize("place", [(torch.Tensor, "topk"), (spanning, "_largest_scores")], ids=["search", "bridges"])
def test_an_error_in_the_fit_leaves_the_users_precision(place, shortened_products):
    def fail(*_, **__):
        assert torch.get_float32_matmul_precision() == "highest"
        raise ArithmeticError("in the middle")

    with many_classes() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(*place, fail)
        with pytest.raises(ArithmeticError, match="in the middle"):
            ClassTree(max_neighbors=2).fit(clustered_statistics(200, 8, num_groups=8))
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_float32_matmul_precision() == shortened_products


@pytest.fixture
def newer_setting():
    """The same wish, told in the way of torch 2.9 and later."""
    products = torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):
        pytest.skip("this torch knows the older way alone")
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    yield products
    products.fp32_precision = before


def test_a_precision_chosen_in_the_newer_way_is_kept(newer_setting):
    with many_classes():
        ClassTree(max_neighbors=2).fit(clustered_statistics(200, 8, num_groups=8))
    assert newer_setting.fp32_precision == "tf32"


@pytest.mark.slow
def test_precisions_go_on_to_follow_the_general_setting():
    """In a process of its own, since torch keeps what it has once been told."""
    script = """
import torch
from pml_htl.common.precision import full_products
products, device = torch.backends.cuda.matmul, torch.device("cpu")
with full_products(device):
    pass
torch.backends.fp32_precision = "tf32"
assert products.fp32_precision == "tf32"
with full_products(device):
    assert products.fp32_precision == "ieee"
assert products.fp32_precision == "tf32"
torch.backends.fp32_precision = "ieee"
assert products.fp32_precision == "ieee"
"""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch knows the older way alone")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def draws_of_class(sizes, samples_per_class, num_batches):
    """For each class how often each set of its samples was drawn; samples are numbered from 0 in each class."""
    labels = np.arange(len(sizes)).repeat(sizes)
    shape = {"num_anchors": len(sizes), "neighborhood_size": 1, "samples_per_class": samples_per_class}
    sampler = AnchorNeighborSampler(labels, ClassTree(), batches_per_epoch=num_batches, seed=0, **shape)
    starts = np.cumsum(sizes) - sizes
    found = [Counter() for _ in sizes]
    for batch in sampler:
        for indices in np.reshape(batch, (-1, samples_per_class)):
            label = labels[indices[0]]
            found[label][tuple(sorted(indices - starts[label]))] += 1
    return found


def test_samples_of_a_class_are_drawn_uniformly():
    several, few, two, one = draws_of_class([5, 4, 2, 1], samples_per_class=3, num_batches=6000)
    for draws, size in ((several, 5), (few, 4)):  # without replacement: all sets of three equally often, and so all pairs
        assert set(draws) == set(itertools.combinations(range(size), 3))
        assert scipy.stats.chisquare(list(draws.values())).pvalue > 1e-3
        pairs = Counter(pair for three, times in draws.items() for pair in [*itertools.combinations(three, 2)] * times)
        assert len(pairs) == size * (size - 1) // 2
        expected = 6000 * 3 / len(pairs)
        assert all(abs(times - expected) < 4 * expected**0.5 for times in pairs.values())
    # With replacement: each of three draws is either sample.
    assert set(two) == {(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)}
    assert scipy.stats.chisquare([two[key] for key in sorted(two)], 6000 * np.array([1, 3, 3, 1]) / 8).pvalue > 1e-3
    assert set(one) == {(0, 0, 0)}
