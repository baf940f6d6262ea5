import copy
import io

import numpy as np
import pytest
import scipy.cluster.hierarchy as hierarchy
import torch
from hypothesis import given
from hypothesis import strategies as st

from pml_htl import ClassStatistics, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.tree.cophenetic import largest_between
from pml_htl.tree.linkage import cut_levels, restrict_linkage

from . import oracle
from .examples import KINDS, labelled_embeddings, make_embeddings

pytestmark = pytest.mark.numerical


def fit(embeddings, labels, **kwargs):
    return ClassTree(**kwargs).fit_embeddings(torch.from_numpy(embeddings), labels)


def clear_levels(distances, levels):
    """Levels whose threshold no distance stands within 1e-9 of: there rounding cannot decide."""
    distances = distances[np.triu_indices(len(distances), 1)]
    return [level for level, threshold in enumerate(levels) if np.abs(distances - threshold).min() > 1e-9]


@given(labelled_embeddings(), st.integers(1, 20), st.sampled_from([1, 2]))
@pytest.mark.filterwarnings("ignore:the embeddings have collapsed")
def test_the_tree_is_that_of_the_equations(example, num_levels, power):
    embeddings, labels = example
    tree = fit(embeddings, labels, num_levels=num_levels)
    distances = oracle.class_distances(embeddings, labels)
    spreads, average = oracle.spreads(embeddings, labels)
    levels = oracle.thresholds(average, num_levels)
    nodes = oracle.single_linkage_nodes(distances, levels)
    clear = clear_levels(distances, levels)

    assert tree.labels.tolist() == np.unique(labels).tolist()
    np.testing.assert_allclose(tree.thresholds, levels, atol=1e-6)
    np.testing.assert_allclose(tree.spreads, spreads, atol=1e-6)
    np.testing.assert_array_equal(tree.nodes[:, clear], nodes[:, clear])
    assert (tree.nodes[:, -1] == 0).all()
    if set(range(num_levels)) <= set(clear):  # at the last level everything meets anyway
        from pytorch_metric_learning.distances import LpDistance

        classes = tree.labels
        alpha = DynamicMarginMiner(tree, distance=LpDistance(power=power)).margins(classes[:, None], classes[None])
        expected = [
            [oracle.margin(nodes, levels, spreads, a, n, power=power) for n in range(len(classes))]
            for a in range(len(classes))
        ]
        np.testing.assert_allclose(alpha, expected, atol=1e-6)


@given(labelled_embeddings(kinds=["random", "clustered"]), st.sampled_from(["average", "complete"]))
def test_other_linkages(example, linkage):
    embeddings, labels = example
    tree = fit(embeddings, labels, linkage=linkage)
    distances = oracle.class_distances(embeddings, labels)
    nodes = oracle.agglomerated_nodes(distances, tree.thresholds.numpy(), linkage)
    np.testing.assert_array_equal(tree.nodes, nodes)


@given(labelled_embeddings(kinds=["random", "clustered"], max_classes=20), st.integers(1, 20))
def test_neighbors_are_the_nearest_classes_nearest_first(example, k):
    embeddings, labels = example
    tree = fit(embeddings, labels)
    k = min(k, len(tree.labels) - 1)
    distances = oracle.class_distances(embeddings, labels)
    np.fill_diagonal(distances, np.inf)
    expected = tree.labels.numpy()[np.argsort(distances, axis=1)[:, :k]]
    np.testing.assert_array_equal(tree.neighbors(tree.labels, k), expected)
    assert tree.neighbors(tree.labels[0], k).tolist() == expected[0].tolist()
    assert tree.neighbors(tree.labels[:2].reshape(2, 1), k).shape == (2, 1, k)


@given(labelled_embeddings(max_classes=12))
@pytest.mark.filterwarnings("ignore:the embeddings have collapsed")
def test_tied_neighbors_are_at_the_nearest_distances(example):
    embeddings, labels = example
    tree = fit(embeddings, labels)
    distances = oracle.class_distances(embeddings, labels)
    np.fill_diagonal(distances, np.inf)
    found = np.take_along_axis(distances, tree.nearest_classes.numpy(), axis=1)
    np.testing.assert_allclose(found, np.sort(distances, axis=1)[:, : found.shape[1]], rtol=0, atol=1e-9)


@given(st.data(), st.sampled_from(["single", "average", "complete"]))
@pytest.mark.filterwarnings("ignore:the embeddings have collapsed")
def test_scipy_linkage_is_scipys(data, linkage):
    # Ties can be broken in any order; with single linkage that changes no height.
    kinds = KINDS if linkage == "single" else ["random", "clustered"]
    embeddings, labels = data.draw(labelled_embeddings(kinds, max_classes=12))
    tree = fit(embeddings, labels, linkage=linkage)
    merges = tree.to_scipy_linkage()
    assert hierarchy.is_valid_linkage(merges)
    distances = oracle.class_distances(embeddings, labels)
    reference = hierarchy.linkage(distances[np.triu_indices(len(distances), 1)], linkage)
    np.testing.assert_allclose(merges[:, 2], reference[:, 2], rtol=0, atol=1e-9)
    np.testing.assert_allclose(hierarchy.cophenet(merges), hierarchy.cophenet(reference), rtol=0, atol=1e-9)
    if linkage == "single":  # the edges of the minimum spanning tree
        np.testing.assert_allclose(distances[tuple(tree.merge_edges.T)], tree.merge_heights, rtol=0, atol=1e-9)


@given(labelled_embeddings(kinds=["random", "tied"], max_classes=12), st.integers(0, 99))
def test_part_of_a_linkage_keeps_the_meeting_heights(example, seed):
    embeddings, labels = example
    merges = fit(embeddings, labels).to_scipy_linkage()
    num_classes = len(merges) + 1
    leaves = np.random.default_rng(seed).permutation(num_classes)[: max(2, num_classes // 2)]
    whole = hierarchy.cophenet(merges)
    square = np.zeros((num_classes, num_classes))
    square[np.triu_indices(num_classes, 1)] = whole
    square += square.T
    part = restrict_linkage(merges, leaves)
    assert hierarchy.is_valid_linkage(part)
    expected = square[np.ix_(leaves, leaves)][np.triu_indices(len(leaves), 1)]
    np.testing.assert_allclose(hierarchy.cophenet(part), expected)


def test_a_height_on_a_threshold_is_not_below_it():
    edges, thresholds = np.array([[0, 1], [1, 2], [0, 3]]), np.array([0.5, 1.0, 2.0, 4.0])
    nodes = cut_levels(edges, np.array([0.5, 1.5, 4.0]), thresholds)
    assert nodes.T.tolist() == [[0, 1, 2, 3], [0, 0, 2, 3], [0, 0, 0, 3], [0, 0, 0, 0]]


def test_lookups_broadcast_and_name_unknown_labels():
    embeddings, labels = make_embeddings("clustered", [3] * 8, 4, seed=0)
    tree = fit(embeddings, labels)
    a, b = tree.labels[:3], tree.labels[:5]
    levels = tree.merge_levels(a.unsqueeze(1), b)
    assert levels.shape == (3, 5) and levels.dtype == torch.int64
    for i, j in np.ndindex(3, 5):
        expected = next(level for level in range(17) if tree.nodes[i, level] == tree.nodes[j, level])
        assert levels[i, j] == expected == tree.merge_levels(int(a[i]), int(b[j]))
    assert (levels.diagonal() == 0).all() and torch.equal(levels[:, :3], levels[:, :3].T)
    assert torch.equal(tree.merge_thresholds(a.unsqueeze(1), b), tree.thresholds[levels])
    assert torch.equal(tree.class_spreads(a), tree.spreads[:3])
    unknown = int(tree.labels[-1]) + 1
    for look_up in (tree.merge_levels, tree.merge_thresholds):
        with pytest.raises(ValueError, match=str(unknown)):
            look_up(a, torch.tensor([unknown]))
    with pytest.raises(ValueError, match=str(unknown)):
        tree.neighbors([unknown], 1)
    with pytest.raises(ValueError, match="keeps 7 neighbors"):
        tree.neighbors(a, 8)
    with pytest.raises(TypeError, match="integers"):
        tree.merge_levels(a.float(), b)


@pytest.mark.parametrize("linkage", ["single", "average", "complete"])
@given(labelled_embeddings(kinds=["random", "clustered"], max_classes=20))
def test_cophenetic_distances(linkage, example):
    embeddings, labels = example
    tree = ClassTree(linkage=linkage).fit_embeddings(torch.from_numpy(embeddings), labels)
    found = tree.cophenetic_distances(tree.labels.unsqueeze(1), tree.labels)
    expected = oracle.merge_heights(oracle.class_distances(embeddings, labels), linkage)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    condensed = hierarchy.cophenet(tree.to_scipy_linkage())
    np.testing.assert_allclose(found.numpy()[np.triu_indices(len(found), 1)], condensed, rtol=0, atol=1e-12)
    levels = torch.searchsorted(tree.thresholds, found, right=True).clamp(max=16).fill_diagonal_(0)
    assert torch.equal(levels, tree.merge_levels(tree.labels.unsqueeze(1), tree.labels))


def test_two_runs_span_any_distance_and_reach_no_further():
    """Also where a logarithm in float32 rounds up: one place short of a power of two."""
    rows = torch.arange(40.0).unsqueeze(1).expand(40, 2**39)  # each value says which row it is of, in no memory
    distances = torch.cat([2 ** torch.arange(39) + change for change in (-1, 0, 1)])[1:]
    runs = 2 ** largest_between(rows, torch.tensor(0), distances).long()
    assert ((runs <= distances) & (distances <= 2 * runs)).all()


def test_cophenetic_distances_of_a_new_fit():
    embeddings, labels = make_embeddings("random", [3] * 40, 6, seed=0)
    tree = fit(embeddings, labels)
    a, b = tree.labels[:7], tree.labels[:11]
    first = tree.cophenetic_distances(a.unsqueeze(1), b)
    assert first.shape == (7, 11) and first.dtype == torch.float64 and (first.diagonal() == 0).all()
    fit_again = ClassTree().fit_embeddings(torch.from_numpy(embeddings[::-1].copy()), labels)
    tree.load_state_dict(fit_again.state_dict())
    expected = fit_again.cophenetic_distances(a.unsqueeze(1), b)
    assert not torch.equal(first, expected)  # the labels went to other samples
    assert torch.equal(tree.cophenetic_distances(a.unsqueeze(1), b), expected)
    with pytest.raises(ValueError, match="not fitted"):
        ClassTree().cophenetic_distances(1, 2)
    with pytest.raises(ValueError, match="999999999"):
        tree.cophenetic_distances(a, 999999999)


def test_not_fitted():
    tree = ClassTree()
    assert not tree.is_fitted and tree.labels is None and "not fitted" in repr(tree)
    for use in (lambda: tree.merge_levels(1, 2), lambda: tree.neighbors(1, 1), tree.to_scipy_linkage):
        with pytest.raises(ValueError, match="not fitted"):
            use()


def bad_statistics():
    ones = torch.ones(2, 3)
    not_finite = ClassStatistics([1, 2], 3).update(torch.ones(4, 3), [1, 1, 2, 2])
    not_finite._sums[0] = torch.nan
    return {
        "two classes": ClassStatistics([1], 3).update(ones, [1, 1]),
        "no samples of label 2": ClassStatistics([1, 2], 3).update(ones, [1, 1]),
        "single sample": ClassStatistics([1, 2], 3).update(ones, [1, 2]),
        "NaN or infinite": not_finite,
    }


@pytest.mark.parametrize("message", bad_statistics())
def test_a_failed_fit_leaves_the_tree_as_it_was(message):
    embeddings, labels = make_embeddings("random", [3] * 5, 4, seed=0)
    tree = fit(embeddings, labels)
    before = copy.deepcopy(tree.state_dict())
    with pytest.raises(ValueError, match=message):
        tree.fit(bad_statistics()[message])
    assert all(torch.equal(before[name], value) for name, value in tree.state_dict().items())
    with pytest.raises(ValueError, match=message):
        unfitted = ClassTree()
        unfitted.fit(bad_statistics()[message])
    assert not unfitted.is_fitted


@pytest.mark.filterwarnings("ignore:the embeddings have collapsed")
def test_classes_as_far_apart_as_can_be():
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    tree = ClassTree(4).fit_embeddings(points[[0, 1, 0, 1]], [1, 1, 2, 2])  # spread 4, distance 2
    assert tree.thresholds.tolist() == [4.0] * 5 and (tree.nodes == 0).all()
    tree = ClassTree(4).fit_embeddings(points[[0, 0, 1, 1]], [1, 1, 2, 2])  # spread 0, distance 4
    assert tree.thresholds.tolist() == [0, 1, 2, 3, 4] and tree.merge_levels(1, 2) == 4


def test_a_fit_that_fails_at_its_end_leaves_the_tree_as_it_was(monkeypatch):
    embeddings, labels = make_embeddings("random", [3] * 5, 4, seed=0)
    tree = fit(embeddings, labels)
    before = copy.deepcopy(tree.state_dict())
    monkeypatch.setattr("pml_htl.tree.linkage.cut_levels", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tree.fit_embeddings(torch.from_numpy(embeddings[::-1].copy()), labels)
    assert all(torch.equal(before[name], value) for name, value in tree.state_dict().items())


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_levels"):
        ClassTree(0)
    with pytest.raises(ValueError, match="single, average, complete"):
        ClassTree(linkage="ward")
    with pytest.raises(ValueError, match="max_neighbors"):
        ClassTree(max_neighbors=0)
    with pytest.raises(TypeError, match="fit_embeddings"):
        ClassTree().fit(torch.ones(3, 3))
    with pytest.raises(ValueError, match="one label per embedding"):
        ClassTree().fit_embeddings(torch.ones(3, 3), [1, 2])
    with pytest.raises(ValueError, match="empty"):
        ClassTree().fit_embeddings(torch.ones(0, 3), [])


def test_state_travels_into_an_unfitted_tree():
    embeddings, labels = make_embeddings("clustered", [3] * 8, 4, seed=0)
    loss = HierarchicalTripletLoss(DynamicMarginMiner(fit(embeddings, labels)))
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = HierarchicalTripletLoss(DynamicMarginMiner(ClassTree()))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state_dict().keys() == loss.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in loss.state_dict().items())
    other.load_state_dict(HierarchicalTripletLoss(DynamicMarginMiner(ClassTree())).state_dict())
    assert not other.miner.tree.is_fitted


def changed(state, **changes):
    return {**state, **changes}


def test_a_state_that_does_not_fit_changes_nothing():
    embeddings, labels = make_embeddings("clustered", [3] * 8, 4, seed=0)
    state = fit(embeddings, labels).state_dict()
    incomplete = {name: value for name, value in state.items() if name != "nodes"}
    bad = {
        "nodes": incomplete,
        "format_version": {},
        "num_levels=16, but this tree has num_levels=4": None,
        "format version is 99": changed(state, format_version=torch.tensor(99)),
        "points outside": changed(state, nodes=state["nodes"] + 8),
        "thresholds should be": changed(state, thresholds=state["thresholds"].float()),
        "not finite": changed(state, spreads=state["spreads"] * torch.nan),
        "not a tensor of 2 dimensions": changed(state, nodes=None),
        "not a tensor of 0 dimensions": changed(state, format_version=torch.ones(2)),
        "not those of its merges": changed(state, nodes=torch.zeros_like(state["nodes"])),
        "thresholds do not ascend": changed(state, thresholds=state["thresholds"].flip(0)),
        "merge_heights do not ascend": changed(state, merge_heights=state["merge_heights"].flip(0)),
        "merges do not join all classes": changed(
            state, merge_edges=torch.zeros_like(state["merge_edges"]), nodes=torch.arange(8).unsqueeze(1).expand(8, 17)
        ),
        "spreads is negative": changed(state, spreads=-state["spreads"]),
        "not different other classes": changed(state, nearest_classes=torch.zeros_like(state["nearest_classes"])),
        "labels is not a dense tensor with values": changed(state, labels=state["labels"].to_sparse()),
        "thresholds is not a dense tensor with values": changed(state, thresholds=state["thresholds"].to("meta")),
        "shape": changed(state, spreads=state["spreads"][:-1]),
        "not sorted": changed(state, labels=state["labels"].flip(0)),
    }
    for message, entry in bad.items():
        tree = ClassTree(4 if entry is None else 16)
        with pytest.raises(RuntimeError, match=message):
            tree.load_state_dict(state if entry is None else entry)
        assert not tree.is_fitted
    other = fit(*make_embeddings("random", [3] * 8, 4, seed=5))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        RuntimeError, match=r"8 classes are not the 8 classes of this tree: only one of them has labels .*\(16 in all\)"
    ):
        other.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_casts_leave_the_tree_as_it_is():
    embeddings, labels = make_embeddings("clustered", [3] * 8, 4, seed=0)
    loss = HierarchicalTripletLoss(DynamicMarginMiner(fit(embeddings, labels)))
    before = copy.deepcopy(loss.state_dict())
    for cast in (loss.half, loss.double, loss.float, lambda: loss.to(torch.bfloat16), loss.share_memory):
        cast()
        for name, value in loss.state_dict().items():
            assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert all(buffer.device.type == "meta" for buffer in copy.deepcopy(loss).to("meta").buffers())
