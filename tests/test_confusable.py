"""What a class tree tells of the data: pairs of classes that are not told apart, and the classes of each node."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pml_htl import ClassTree

from . import oracle
from .examples import labelled_embeddings, make_embeddings

COLUMNS = ("label_a", "label_b", "ratio", "distance", "spread_a", "spread_b", "level")


def pairs_from_the_equations(embeddings, labels, num_levels):
    """Every pair of classes as a row of the table, most suspicious first."""
    distances = oracle.class_distances(embeddings, labels)
    spreads, average = oracle.spreads(embeddings, labels)
    nodes = oracle.single_linkage_nodes(distances, oracle.thresholds(average, num_levels))
    classes = np.unique(labels)
    rows = []
    for a, b in itertools.combinations(range(len(classes)), 2):
        level = next(level for level in range(num_levels + 1) if nodes[a, level] == nodes[b, level])
        ratio = distances[a, b] / ((spreads[a] + spreads[b]) / 2)
        rows.append((classes[a], classes[b], ratio, distances[a, b], spreads[a], spreads[b], level))
    return sorted(rows, key=lambda row: row[2])


@given(labelled_embeddings(kinds=["random", "clustered"]), st.integers(1, 200))
def test_pairs_are_those_of_the_equations(example, k):
    embeddings, labels = example
    table = ClassTree(4).fit_embeddings(torch.from_numpy(embeddings), labels).confusable(k)
    expected = pairs_from_the_equations(embeddings, labels, 4)[:k]
    assert table.dtype.names == COLUMNS and len(table) == len(expected)
    for name, column in zip(COLUMNS, zip(*expected, strict=True), strict=True):
        if not name.startswith(("label", "spread", "level")):  # equal ratios come in another order
            np.testing.assert_allclose(table[name], column, rtol=1e-5, atol=1e-6)
    by_pair = {row[:2]: row for row in pairs_from_the_equations(embeddings, labels, 4)}
    assert len({(row["label_a"], row["label_b"]) for row in table}) == len(table)
    for row in table:
        np.testing.assert_allclose(row.tolist(), by_pair[row["label_a"], row["label_b"]], rtol=1e-5, atol=1e-6)


def test_halves_of_a_class_are_found_first():
    embeddings, labels = make_embeddings("clustered", [40] * 12, 16, seed=0)
    halves = labels.copy()
    halves[np.flatnonzero(labels == labels[0])[::2]] = 99
    first = ClassTree().fit_embeddings(torch.from_numpy(embeddings), halves).confusable(3)[0]
    assert (first["label_a"], first["label_b"]) == (labels[0], 99)
    assert first["ratio"] == pytest.approx(1, abs=0.1) and first["level"] in (0, 1)


def test_few_neighbours_hide_pairs_and_nothing_else():
    """With lists of one, each class and its nearest; a pair stands there once though both lists have it."""
    embeddings, labels = make_embeddings("random", [5] * 9, 8, seed=1)
    tree = ClassTree(max_neighbors=1).fit_embeddings(torch.from_numpy(embeddings), labels)
    nearest = torch.stack([tree.labels, tree.neighbors(tree.labels, 1)[:, 0]], dim=1)
    expected = {tuple(sorted(pair)) for pair in nearest.tolist()}
    table = tree.confusable(100)
    assert {(row["label_a"], row["label_b"]) for row in table} == expected and len(table) == len(expected)
    assert (np.diff(table["ratio"]) >= 0).all()


@pytest.mark.filterwarnings("ignore:the embeddings have collapsed")
def test_classes_at_one_point():
    """Spreads and distances of zero: these pairs come first, in the order of their labels, with the ratio 0."""
    points = torch.eye(4)[[0, 0, 0, 0, 1, 1, 1, 2]]
    tree = ClassTree().fit_embeddings(torch.cat([points, -points[:2] + 0.1]), [1, 1, 2, 2, 3, 3, 3, 4, 5, 5])
    table = tree.confusable(2)
    assert (table["label_a"][0], table["label_b"][0], table["ratio"][0]) == (1, 2, 0)
    assert np.isfinite(table["ratio"]).all()


def test_many_classes_by_products():
    """Beyond 2,048 classes distances come from a search in float32."""
    embeddings, labels = make_embeddings("clustered", [3] * 2100, 8, seed=2)
    tree = ClassTree(max_neighbors=8).fit_embeddings(torch.from_numpy(embeddings), labels)
    table = tree.confusable(50)
    assert len(table) == 50 and (np.diff(table["ratio"]) >= 0).all()
    for row in table[:10]:
        both = np.isin(labels, (row["label_a"], row["label_b"]))
        found = oracle.class_distances(embeddings[both], labels[both])[0, 1]
        assert row["distance"] == pytest.approx(found, abs=2e-6)


def test_given_hierarchies():
    labels = [7, 3, 5]
    distances = torch.tensor([[0.0, 0.4, 0.8], [0.4, 0.0, 0.6], [0.8, 0.6, 0.0]])
    table = ClassTree.from_distances(labels, distances, spreads=[0.4, 0.4, 0.4]).confusable()
    assert [row.tolist()[:2] for row in table] == [(3, 7), (3, 5), (5, 7)]
    np.testing.assert_allclose(table["ratio"], [1, 1.5, 2], rtol=1e-6)
    tree = ClassTree.from_taxonomy([0, 1, 2], [[0, 0], [0, 0], [1, 0]])
    with pytest.raises(ValueError, match="not fitted"):
        tree.confusable()
    embeddings, own = make_embeddings("random", [4] * 3, 5, seed=0)
    tree.fit_embeddings(torch.from_numpy(embeddings), np.searchsorted(np.unique(own), own))
    table = tree.confusable()
    assert (table["label_a"][0], table["label_b"][0], table["level"][0]) == (0, 1, 1)
    np.testing.assert_allclose(
        table["distance"], tree.cophenetic_distances(table["label_a"].tolist(), table["label_b"].tolist())
    )


def test_distances_travel_with_the_state_and_older_files_lack_them():
    embeddings, labels = make_embeddings("random", [4] * 6, 5, seed=0)
    tree = ClassTree().fit_embeddings(torch.from_numpy(embeddings), labels)
    state = tree.state_dict()
    loaded = ClassTree()
    loaded.load_state_dict(state)
    assert (loaded.confusable() == tree.confusable()).all() and (tree.double().confusable() == tree.confusable()).all()
    del state["nearest_distances"]
    state["format_version"] = torch.tensor(1)
    older = ClassTree()
    older.load_state_dict(state)
    assert torch.equal(older.neighbors(older.labels, 2), tree.neighbors(tree.labels, 2))
    with pytest.raises(ValueError, match="saved by an earlier version, without distances; fit or refresh it again"):
        older.confusable()
    changed = {**tree.state_dict(), "nearest_distances": tree.nearest_distances.flip(1)}
    with pytest.raises(RuntimeError, match="its nearest_distances do not ascend"):
        ClassTree().load_state_dict(changed)
    changed["nearest_distances"] = tree.nearest_distances.double()
    with pytest.raises(RuntimeError, match=r"nearest_distances should be torch.float32 of shape \(6, 5\)"):
        ClassTree().load_state_dict(changed)


@given(labelled_embeddings(kinds=["random", "clustered"]))
def test_groups_are_the_classes_of_each_node(example):
    embeddings, labels = example
    tree = ClassTree(3).fit_embeddings(torch.from_numpy(embeddings), labels)
    for level in range(4):
        groups = tree.groups(level)
        assert torch.cat(groups).sort().values.tolist() == tree.labels.tolist()
        assert len(groups) == getattr(tree, f"nodes_at_level_{level}")
        assert [group[0].item() for group in groups] == sorted(group[0].item() for group in groups)
        for group in groups:
            assert (group.diff() > 0).all() and (tree.merge_levels(group, group[0]) <= level).all()
        for one, other in itertools.combinations(groups, 2):
            assert tree.merge_levels(one[0], other[0]) > level


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda tree: tree.confusable(0), "k must be an integer of at least 1, but it is 0|k must be"),
        (lambda tree: tree.confusable(True), "k must be"),
        (lambda tree: tree.groups(-1), "level must be"),
        (lambda tree: tree.groups(17), "level is 17, but this tree has levels 0 to 16"),
        (lambda tree: ClassTree().groups(0), "not fitted"),
        (lambda tree: ClassTree().confusable(), "not fitted"),
    ],
)
def test_refusals(call, message):
    embeddings, labels = make_embeddings("random", [4] * 3, 5, seed=0)
    tree = ClassTree().fit_embeddings(torch.from_numpy(embeddings), labels)
    with pytest.raises(ValueError, match=message):
        call(tree)
    with pytest.raises(TypeError, match=r"level must be an integer, but it is 0\.5"):
        tree.groups(0.5)
