"""Trees of a given hierarchy: every pair, level and neighbour by slow loops, and what a refresh keeps and renews."""

import copy
import itertools
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from pml_htl import HTL, AnchorNeighborSampler, ClassStatistics, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss

from . import oracle
from .examples import labelled_embeddings, make_embeddings
from .training import NUM_CLASSES, make_dataset, make_htl, make_trainer

pytestmark = pytest.mark.numerical

SHAPE = ("labels", "merge_edges", "nearest_classes", "given_heights", "taxonomy_height")
RENEWED = ("thresholds", "spreads", "average_spread", "merge_heights", "nodes")

# Two genera of a family, and a genus of another one; labels are neither sorted nor contiguous.
LABELS = [70, -3, 12, 5, 900, 41]
ANCESTORS = [[1, 8, 0], [2, 8, 0], [1, 8, 0], [3, 9, 0], [2, 8, 0], [3, 9, 0]]


@st.composite
def taxonomies(draw, max_classes=12):
    """Labels (C,) and nested ancestors (C, H) with a common root, both with numbers of any kind."""
    num_classes, height = draw(st.integers(2, max_classes)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes, columns = np.arange(num_classes), []
    for level in range(1, height + 1):
        parents = rng.integers(1 if level == height else rng.integers(1, nodes.max() + 2), size=nodes.max() + 1)
        nodes = parents[nodes]
        columns.append(rng.choice(10**6, nodes.max() + 1, replace=False)[nodes] - 5 * 10**5)
    return rng.choice(10**6, num_classes, replace=False) - 5 * 10**5, np.stack(columns, axis=1)


def heights_of(labels, ancestors):
    """How many levels up each pair of classes, sorted by label, has its lowest common ancestor; 0 for a class and itself."""
    rows = [row for _, row in sorted(zip(labels, np.asarray(ancestors).tolist(), strict=True))]
    heights = np.zeros((len(rows), len(rows)), dtype=int)
    for a, b in itertools.permutations(range(len(rows)), 2):
        heights[a, b] = next(h for h in range(1, len(rows[a]) + 1) if rows[a][h - 1] == rows[b][h - 1])
    return heights


def samples_of(labels, seed=0, dimensions=6):
    """Embeddings (3 C, D) and labels (3 C,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(labels).repeat_interleave(3)
    return torch.randn(len(labels), dimensions, generator=generator) + 1, labels


def state_of(tree, names):
    return {name: getattr(tree, name).clone() for name in names}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@given(taxonomies(), st.integers(1, 20), st.integers(0, 99))
def test_a_taxonomy_gives_the_margins_of_its_formula(taxonomy, num_levels, seed):
    labels, ancestors = taxonomy
    heights, top = heights_of(labels, ancestors), ancestors.shape[1]
    embeddings, sample_labels = samples_of(labels, seed)
    spreads, d_0 = oracle.spreads(oracle.unit(embeddings.double().numpy()), sample_labels.numpy())
    merges = np.where(heights > 0, d_0 + heights / top * (4 - d_0), 0)
    for levels in (None, num_levels):
        tree = ClassTree.from_taxonomy(labels, ancestors, num_levels=levels).fit_embeddings(embeddings, sample_labels)
        every = tree.labels.unsqueeze(1), tree.labels
        assert tree.labels.tolist() == sorted(labels.tolist()) and tree.num_levels == (levels or top)
        np.testing.assert_allclose(tree.cophenetic_distances(*every), merges, atol=1e-6)
        meeting = [[next(n for n in range(99) if n * top >= h * tree.num_levels) for h in row] for row in heights.tolist()]
        assert tree.merge_levels(*every).tolist() == meeting
        if levels is None:  # a level for each of the taxonomy
            alpha = DynamicMarginMiner(tree).margins(*every)
            different = ~np.eye(len(labels), dtype=bool)
            np.testing.assert_allclose(alpha.numpy()[different], (0.1 + merges - spreads[:, None])[different], atol=1e-6)


@given(taxonomies(max_classes=20), st.integers(1, 20), st.integers(0, 99))
def test_nearest_classes_of_a_taxonomy_meet_lowest(taxonomy, max_neighbors, seed):
    labels, ancestors = taxonomy
    tree = ClassTree.from_taxonomy(labels, ancestors, max_neighbors=max_neighbors, seed=seed)
    heights, nearest = heights_of(labels, ancestors), tree.nearest_classes.tolist()
    k = min(max_neighbors, len(labels) - 1)
    for place, row in enumerate(nearest):
        others = sorted(heights[place, other] for other in range(len(labels)) if other != place)
        assert [heights[place, other] for other in row] == others[:k]
        assert len(set(row)) == k and place not in row
    assert tree.neighbors(tree.labels, k).tolist() == [[tree.labels[other].item() for other in row] for row in nearest]
    again = ClassTree.from_taxonomy(labels, ancestors, max_neighbors=max_neighbors, seed=seed)
    assert torch.equal(tree.nearest_classes, again.nearest_classes)


@pytest.mark.parametrize("kind", ["taxonomy", "distances"])
def test_ties_are_shuffled_by_the_seed_and_for_each_class(kind):
    """Six siblings among nine classes: each of the five others is the first and the second of class 0 equally often."""
    group = np.repeat([0, 1], [6, 3])
    places = {0: Counter(), 1: Counter(), 5: Counter()}
    orders = set()
    for seed in range(300):
        if kind == "taxonomy":
            tree = ClassTree.from_taxonomy(range(9), np.stack([group, 0 * group], axis=1), seed=seed)
        else:
            tree = ClassTree.from_distances(range(9), np.where(group[:, None] == group, 0.5, 1.0), seed=seed)
        nearest = tree.nearest_classes.tolist()
        assert all(set(row[:5]) | {c} == set(range(6)) for c, row in enumerate(nearest[:6]))
        orders.add(len({tuple(x for x in row[:5] if x not in (0, 1)) for row in nearest[:2]}))
        for place, counter in places.items():
            counter[nearest[0][place]] += 1
    assert set(places[0]) == set(places[1]) == {1, 2, 3, 4, 5} and set(places[5]) == {6, 7, 8}
    assert all(35 < count < 90 for place in (0, 1) for count in places[place].values())  # 60 expected, +- 7
    assert all(70 < count < 130 for count in places[5].values())  # 100 expected, +- 8
    assert orders == {1, 2}  # classes 0 and 1 mostly do not rank their siblings alike


@st.composite
def matrices(draw, tied=True, max_classes=9):
    """Labels (C,) and symmetric squared distances (C, C), perhaps with many equal ones, zero among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_classes = draw(st.integers(2, max_classes))
    matrix = rng.uniform(0, 4, (num_classes, num_classes))
    if tied and draw(st.booleans()):
        matrix = np.floor(matrix)
    matrix = np.triu(matrix, 1)
    return rng.choice(10**6, num_classes, replace=False) - 5 * 10**5, matrix + matrix.T


@pytest.mark.parametrize("linkage", ["single", "average", "complete"])
@given(st.data())
def test_distances_give_merges_neighbors_and_levels(linkage, data):
    labels, matrix = data.draw(matrices(tied=linkage == "single"))
    max_neighbors, num_levels = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    spreads = np.random.default_rng(0).uniform(0, 2, len(labels))
    tree = ClassTree.from_distances(
        labels, matrix, spreads=spreads, linkage=linkage, num_levels=num_levels, max_neighbors=max_neighbors
    )
    order = np.argsort(labels)
    distances = matrix[np.ix_(order, order)]
    every = tree.labels.unsqueeze(1), tree.labels
    assert tree.is_fitted and tree.labels.tolist() == sorted(labels.tolist())
    np.testing.assert_allclose(
        tree.cophenetic_distances(*every), oracle.merge_heights(distances, linkage), rtol=0, atol=1e-12
    )
    np.testing.assert_array_equal(tree.spreads, spreads[order])
    np.testing.assert_allclose(tree.thresholds, oracle.thresholds(spreads.mean(), num_levels), rtol=0, atol=1e-12)
    if linkage == "single":
        nodes = oracle.single_linkage_nodes(distances, tree.thresholds.numpy())
    else:
        nodes = oracle.agglomerated_nodes(distances, tree.thresholds.numpy(), linkage)
    np.testing.assert_array_equal(tree.nodes, nodes)
    for place, row in enumerate(tree.nearest_classes.tolist()):
        others = sorted(distances[place, other] for other in range(len(labels)) if other != place)
        assert [distances[place, other] for other in row] == others[: len(row)] and len(set(row)) == len(row)
        assert len(row) == min(max_neighbors, len(labels) - 1) and place not in row


@given(labelled_embeddings(kinds=["random", "clustered"]), st.sampled_from(["single", "average", "complete"]))
def test_the_distances_of_a_data_set_give_the_tree_that_its_fit_finds(example, linkage):
    embeddings, labels = example
    statistics = ClassStatistics(labels, embeddings.shape[1]).update(torch.from_numpy(embeddings), labels)
    found = ClassTree(linkage=linkage).fit(statistics)
    matrix = statistics.squared_distances().fill_diagonal_(torch.nan)  # it does not count
    tree = ClassTree.from_distances(found.labels, matrix, spreads=statistics.spreads, linkage=linkage)
    for name in ("labels", "spreads", "nearest_classes", "nodes"):
        assert torch.equal(getattr(tree, name), getattr(found, name)), name
    for name in ("thresholds", "merge_heights"):
        torch.testing.assert_close(getattr(tree, name), getattr(found, name), atol=1e-12, rtol=0)
    before = state_of(tree, SHAPE)
    tree.fit(statistics)
    assert same(before, state_of(tree, SHAPE)) and torch.equal(tree.nodes, found.nodes)


def trees():
    rng = np.random.default_rng(0)
    matrix = rng.uniform(0.5, 3.5, (6, 6))
    return {
        "taxonomy": ClassTree.from_taxonomy(LABELS, ANCESTORS),
        "distances": ClassTree.from_distances(LABELS, matrix + matrix.T - (matrix + matrix.T) / 2, num_levels=3),
    }


KINDS = pytest.mark.parametrize("kind", ["taxonomy", "distances"])


@KINDS
def test_before_the_first_fit_there_are_neighbors_and_no_margins(kind):
    tree = trees()[kind]
    assert tree.is_given and not tree.is_fitted and "given hierarchy, not fitted" in repr(tree)
    assert tree.neighbors(LABELS, 2).shape == (6, 2)
    assert not ClassTree().is_given
    margins = DynamicMarginMiner(tree, initial_margin=0.3).margins(torch.tensor(LABELS), torch.tensor(LABELS))
    assert margins.tolist() == [0.3] * 6
    for look_up in (tree.merge_levels, tree.merge_thresholds, tree.cophenetic_distances):
        with pytest.raises(ValueError, match="not fitted yet"):
            look_up(70, -3)
    for look_up in (lambda: tree.class_spreads(70), tree.to_scipy_linkage):
        with pytest.raises(ValueError, match="not fitted yet"):
            look_up()
    with pytest.raises(ValueError, match="label 8 not among the 6 classes"):
        tree.check_labels([70, 8])
    assert tree.d_0 == 0 and tree.nodes_at_level_0 == 0  # the records are those of any tree that is not fitted


@KINDS
def test_a_fit_keeps_the_shape_and_renews_the_rest(kind):
    tree = trees()[kind]
    shape = state_of(tree, SHAPE)
    found = []
    for seed in range(2):
        embeddings, labels = samples_of(LABELS, seed)
        tree.fit_embeddings(embeddings, labels)
        statistics = ClassStatistics(labels, 6).update(embeddings, labels)
        assert same(shape, state_of(tree, SHAPE))
        assert torch.equal(tree.spreads, statistics.spreads) and tree.d_0 == statistics.average_spread.item()
        np.testing.assert_allclose(tree.thresholds, oracle.thresholds(tree.d_0, 3), rtol=0, atol=1e-12)
        found.append(state_of(tree, RENEWED))
    assert not torch.equal(found[0]["thresholds"], found[1]["thresholds"])
    kept = torch.equal(found[0]["merge_heights"], found[1]["merge_heights"])
    assert kept == (kind == "distances")  # a matrix stays where it is, a taxonomy is mapped anew
    plain = ClassTree(3).fit_embeddings(embeddings, labels)
    assert not torch.equal(plain.merge_edges, tree.merge_edges)


def test_heights_of_a_taxonomy_are_its_thresholds():
    tree = trees()["taxonomy"].fit_embeddings(*samples_of(LABELS))
    heights = heights_of(LABELS, ANCESTORS)
    every = tree.labels.unsqueeze(1), tree.labels
    assert tree.merge_levels(*every).tolist() == heights.tolist()
    different = torch.from_numpy(heights > 0)
    # to the last digit
    assert torch.equal(tree.merge_thresholds(*every)[different], tree.cophenetic_distances(*every)[different])
    assert tree.merge_thresholds(70, 5) == 4 and (tree.nodes[:, 0] == torch.arange(6)).all()


@KINDS
@pytest.mark.parametrize("change", ["one more", "one less"])
def test_a_fit_on_other_classes_changes_nothing(kind, change):
    tree = trees()[kind]
    labels = [*LABELS, 1000] if change == "one more" else LABELS[1:]
    for fitted in (False, True):
        if fitted:
            tree.fit_embeddings(*samples_of(LABELS))
        before = copy.deepcopy(tree.state_dict())
        with pytest.raises(ValueError, match=f"only one of them knows label {1000 if change == 'one more' else 70};"):
            tree.fit_embeddings(*samples_of(labels))
        with pytest.raises(ValueError, match="no samples of label 41"):
            tree.fit(ClassStatistics(LABELS, 6).update(*samples_of(LABELS[:-1])))
        assert same(before, tree.state_dict()) and tree.is_fitted == fitted


@KINDS
@pytest.mark.parametrize("fitted", [False, True])
def test_the_shape_travels_with_the_state(kind, fitted, tmp_path):
    tree = trees()[kind]
    if fitted:
        tree.fit_embeddings(*samples_of(LABELS))
    loss = HierarchicalTripletLoss(DynamicMarginMiner(tree))
    torch.save(loss.state_dict(), tmp_path / "loss.pth")
    loaded = torch.load(tmp_path / "loss.pth", weights_only=True)
    copies = [copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))]
    for other in (ClassTree(3), trees()[kind], trees()[kind].fit_embeddings(*samples_of(LABELS, seed=5))):
        HierarchicalTripletLoss(DynamicMarginMiner(other)).load_state_dict(loaded)
        copies.append(other)
    for other in copies:
        assert other.is_given and other.is_fitted == fitted and same(tree.state_dict(), other.state_dict())
        other.half().to(torch.bfloat16)
        assert same(tree.state_dict(), other.state_dict())
        other.fit_embeddings(*samples_of(LABELS, seed=1))
        assert same(state_of(tree, SHAPE), state_of(other, SHAPE))
    expected = copy.deepcopy(tree).fit_embeddings(*samples_of(LABELS, seed=1)).state_dict()
    assert all(same(expected, other.state_dict()) for other in copies)
    assert all(buffer.device.type == "meta" for buffer in copy.deepcopy(tree).to("meta").buffers())


def test_only_a_given_hierarchy_takes_the_place_of_one(tmp_path):
    plain = ClassTree(3).fit_embeddings(*samples_of(LABELS))
    assert plain.state_dict()["format_version"] == 4 and not {*SHAPE[-2:]} & {*plain.state_dict()}
    tree = trees()["taxonomy"]
    assert tree.state_dict()["format_version"] == 2
    before = copy.deepcopy(tree.state_dict())
    for other in (plain, ClassTree(3)):
        with pytest.raises(RuntimeError, match="without a given hierarchy, which this tree has"):
            tree.load_state_dict(other.state_dict())
    assert same(before, tree.state_dict())
    tree.load_state_dict(trees()["distances"].state_dict())
    assert tree.taxonomy_height == 0
    plain.load_state_dict(before)  # the classes are the same
    assert plain.is_given and not plain.is_fitted and plain.state_dict()["format_version"] == 2


def changed(state, **changes):
    return {**state, **changes}


def bad_states():
    shape = trees()["taxonomy"].state_dict()
    state = trees()["taxonomy"].fit_embeddings(*samples_of(LABELS)).state_dict()
    fixed = trees()["distances"].fit_embeddings(*samples_of(LABELS)).state_dict()
    heights, edges = shape["given_heights"], shape["merge_edges"]
    return {
        r"Missing.*taxonomy_height": {name: value for name, value in shape.items() if name != "taxonomy_height"},
        r"Missing.*thresholds": {name: value for name, value in state.items() if name != "thresholds"},
        "num_levels=3, but this tree has num_levels=16": state,
        "version is 1, but its entries are those of version 2": changed(shape, format_version=torch.tensor(1)),
        "do not ascend": changed(shape, given_heights=heights.flip(0)),
        "not among the 2 levels": changed(shape, taxonomy_height=torch.tensor(2)),
        "not among the 3 levels": changed(shape, given_heights=heights - 0.5),
        "do not join all classes": changed(shape, merge_edges=edges[:1].expand(5, 2)),
        "given_heights should be torch.float64": changed(shape, given_heights=heights.long()),
        "taxonomy_height should be torch.int64": changed(shape, taxonomy_height=torch.tensor(3.0)),
        "points outside": changed(shape, nearest_classes=shape["nearest_classes"] + 1),
        "merge_heights are not those": changed(state, merge_heights=state["merge_heights"] + 0.1),
        "its merge_heights are not those": changed(fixed, merge_heights=fixed["merge_heights"] + 0.1),
        "its nodes are not those": changed(state, nodes=state["nodes"].roll(1, 1)),
    }


@pytest.mark.parametrize("message", bad_states())
def test_a_state_that_does_not_fit_changes_nothing(message):
    for tree in (ClassTree(16 if "has num_levels=16" in message else 3), trees()["distances"]):
        if tree.is_given and "num_levels" in message:
            continue
        before = copy.deepcopy(tree.state_dict())
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            tree.load_state_dict(bad_states()[message])
        assert same(before, tree.state_dict())
    with pytest.raises(RuntimeError, match="only one of them has label 1000"):
        ClassTree.from_taxonomy([*LABELS, 1000], [*ANCESTORS, [1, 8, 0]]).load_state_dict(trees()["taxonomy"].state_dict())


def test_batches_have_siblings_from_the_first_on():
    labels = torch.arange(40).repeat_interleave(3)
    family = np.random.default_rng(0).permutation(40) // 4  # ten families of four
    tree = ClassTree.from_taxonomy(range(40), np.stack([family, 0 * family], axis=1))
    sampler = AnchorNeighborSampler(
        labels, tree, num_anchors=2, neighborhood_size=4, samples_per_class=2, batches_per_epoch=60, seed=0
    )
    companions = [set() for _ in range(40)]
    for fitted in (False, True):
        for batch in sampler:
            classes = labels[batch].reshape(2, 4, 2)[..., 0]
            for group in classes.tolist():
                assert len({family[c] for c in group}) == 1 or len({family[c] for c in classes.flatten().tolist()}) < 3
                companions[group[0]].update(group[1:])
        assert tree.is_fitted == fitted
        tree.fit_embeddings(*samples_of(range(40)))
    assert min(map(len, companions)) >= 3


def test_a_plain_loop_keeps_the_taxonomy_and_renews_its_margins():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24).repeat_interleave(6)
    inputs = torch.randn(24, 10, generator=generator)[labels] + 0.5 * torch.randn(144, 10, generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    ancestors = torch.stack([torch.arange(24) // 3, torch.arange(24) // 12, torch.zeros(24, dtype=torch.long)], dim=1)
    tree = ClassTree.from_taxonomy(torch.arange(24), ancestors, seed=1)
    htl = HTL(
        labels, tree=tree, form="paper", num_anchors=2, neighborhood_size=3, samples_per_class=3, batches_per_epoch=6, seed=0
    )
    assert htl.tree is htl.sampler.tree is htl.miner.tree is tree
    refresh = htl.refresh_hook(TensorDataset(inputs, labels))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    shape, spreads = state_of(tree, SHAPE), []
    for epoch in range(3):
        assert tree.is_fitted == (epoch > 0)
        for x, y in DataLoader(TensorDataset(inputs, labels), batch_sampler=htl.sampler):
            optimizer.zero_grad()
            htl.loss(model(x), y).backward()
            optimizer.step()
        refresh.refresh(model)
        spreads.append(tree.d_0)
        margin = htl.miner.margins(0, [1, 3, 23]) - 0.1 + tree.class_spreads(0)
        expected = [tree.d_0 + h / 3 * (4 - tree.d_0) for h in (1, 2, 3)]
        np.testing.assert_allclose(margin, expected, rtol=0, atol=1e-12)
    assert same(shape, state_of(tree, SHAPE)) and len(set(spreads)) == 3


@pytest.mark.parametrize("mode", ["full", "streaming"])
def test_pmls_trainer_with_a_given_tree(mode):
    dataset = make_dataset()
    classes = dataset.tensors[1].unique()
    ancestors = torch.stack([torch.arange(NUM_CLASSES) // 4, torch.zeros(NUM_CLASSES, dtype=torch.long)], dim=1)
    tree = ClassTree.from_taxonomy(classes, ancestors)
    shape = state_of(tree, SHAPE)
    htl = make_htl(dataset.tensors[1], tree=tree)
    hook = htl.refresh_hook(dataset, mode=mode)
    make_trainer(htl, dataset, hook=hook, iterations_per_epoch=9).train(num_epochs=2)  # each class is an anchor in 8
    assert hook.num_refreshes > 0 and tree.is_fitted and same(shape, state_of(tree, SHAPE))
    assert htl.loss.margin != htl.miner.initial_margin


def test_the_labels_of_a_recipe_are_those_of_its_tree():
    samples = [label for label in [*LABELS, 1000] for _ in range(3)]
    with pytest.raises(ValueError, match="the tree has 6 classes and the sampler has 7: only one of them knows label 1000;"):
        HTL(samples, tree=trees()["taxonomy"], num_anchors=1, neighborhood_size=3, samples_per_class=2)


def test_many_classes_without_a_matrix():
    """Of 4,000 classes C x C int64 would be 128 MB, and C x C bytes 16 MB."""
    ancestors = np.stack([np.arange(4_000) // 20, np.arange(4_000) // 1000, np.zeros(4_000, dtype=int)], axis=1)
    tracemalloc.start()  # numpy tells it of its arrays
    tree = ClassTree.from_taxonomy(np.arange(4_000), ancestors, max_neighbors=32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    siblings = tree.nearest_classes[:, :19] // 20
    assert (siblings == torch.arange(4_000).unsqueeze(1) // 20).all()
    assert (tree.nearest_classes // 1000 == torch.arange(4_000).unsqueeze(1) // 1000).all()
    assert 1e6 < peak < 8e6  # the nearest classes alone are 1 MB


NAN_MATRIX = np.array([[0, 1], [1, np.nan]]) * np.nan
BAD_DISTANCES = {
    "twice": (([1, 2, 1], np.ones((3, 3))), {}, ValueError, "label 1 came again"),
    "one class": (([1], [[0.0]]), {}, ValueError, "at least two classes"),
    "labels of samples": (([[1, 2]], np.ones((2, 2))), {}, ValueError, r"shape \(C,\)"),
    "words": ((["a", "b"], np.ones((2, 2))), {}, TypeError, "labels must be integers"),
    "shape": (([1, 2], np.ones((3, 3))), {}, ValueError, r"shape \(C, C\) for the 2 labels, but it is \(3, 3\)"),
    "condensed": (([1, 2], np.ones(1)), {}, ValueError, r"but it is \(1,\)"),
    "large": (([7, 2], [[0, 9.0], [9, 0]]), {}, ValueError, "from 0 to 4, but there is 9 from class 2 to class 7"),
    "negative": (([7, 2], [[0, -1.0], [-1, 0]]), {}, ValueError, "there is -1 from class 2"),
    "nan": (([7, 2], NAN_MATRIX), {}, ValueError, "there is nan from class 2"),
    "uneven": (([7, 2], [[0, 1.0], [2, 0]]), {}, ValueError, "symmetric, but it has 2 from class 2 to class 7 and 1 back"),
    "complex": (([7, 2], torch.ones(2, 2, dtype=torch.complex64)), {}, TypeError, "real numbers"),
    "spreads": (([7, 2], np.ones((2, 2))), {"spreads": [1.0]}, ValueError, r"spreads must be of shape \(C,\)"),
    "nan spread": (([7, 2], np.ones((2, 2))), {"spreads": [np.nan, 1]}, ValueError, "nan of class 7"),
    "linkage": (([7, 2], np.ones((2, 2))), {"linkage": "ward"}, ValueError, "single, average, complete"),
    "seed": (([7, 2], np.ones((2, 2))), {"seed": -1}, ValueError, "seed must be an integer of at least 0"),
}


@pytest.mark.parametrize("kind", BAD_DISTANCES)
def test_bad_distances(kind):
    arguments, settings, error, message = BAD_DISTANCES[kind]
    with pytest.raises(error, match=message):
        ClassTree.from_distances(*arguments, **settings)


def test_rounding_is_no_error():
    matrix = torch.tensor([[0.3, 1, -2e-7], [1 + 2e-7, 0.3, 4 + 2e-7], [0, 4, 0.3]], dtype=torch.float32)
    tree = ClassTree.from_distances([3, 1, 2], matrix, spreads=[0.0, 0.0, -1e-8])
    assert tree.merge_heights[0] == 0 and (tree.spreads == 0).all()
    given_matrix = matrix.clone()
    ClassTree.from_distances([3, 1, 2], matrix)
    assert torch.equal(matrix, given_matrix)  # the user's matrix is left alone
    exact = np.array([[0.3, 1.0], [1.0, 0.3]])
    ClassTree.from_distances([1, 2], exact)
    assert exact.tolist() == [[0.3, 1.0], [1.0, 0.3]]


BAD_TAXONOMIES = {
    "not nested": (
        [[1, 8, 0], [1, 9, 0], [2, 8, 0]],
        ValueError,
        r"classes (-3 and 70|70 and -3) share ancestor 1 in column 0",
    ),
    "no root": ([[1, 8], [2, 8], [3, 9]], ValueError, r"root of all classes, but class -3 has 8 there and class 12 has 9"),
    "one row less": ([[1, 0], [2, 0]], ValueError, r"shape \(C, H\), a row for each of the 3 labels"),
    "one column": ([1, 2, 3], ValueError, r"but it is \(3,\)"),
    "no columns": (np.zeros((3, 0), dtype=int), ValueError, r"but it is \(3, 0\)"),
    "floats": ([[0.5, 0], [1, 0], [2, 0]], TypeError, "ancestors must be integers"),
}


@pytest.mark.parametrize("kind", BAD_TAXONOMIES)
def test_bad_taxonomies(kind):
    ancestors, error, message = BAD_TAXONOMIES[kind]
    with pytest.raises(error, match=message):
        ClassTree.from_taxonomy(LABELS[:3], ancestors)
    with pytest.raises(ValueError, match="label 70 came again"):
        ClassTree.from_taxonomy([70, 70], [[0], [0]])
    with pytest.raises(ValueError, match="num_levels"):
        ClassTree.from_taxonomy(LABELS, ANCESTORS, num_levels=0)
    with pytest.raises(ValueError, match="max_neighbors"):
        ClassTree.from_taxonomy(LABELS, ANCESTORS, max_neighbors=0)


def test_a_flat_taxonomy_and_a_matrix_of_one_value():
    flat = ClassTree.from_taxonomy(range(5), [[0]] * 5).fit_embeddings(*samples_of(range(5)))
    assert flat.merge_thresholds(0, [1, 2, 3, 4]).tolist() == [4] * 4
    embeddings, labels = make_embeddings("random", [3] * 4, 5, seed=0)
    even = ClassTree.from_distances(np.unique(labels), np.full((4, 4), 2.0)).fit_embeddings(
        torch.from_numpy(embeddings), labels
    )
    assert even.cophenetic_distances(even.labels[0], even.labels[1:]).tolist() == [2.0] * 3
