"""Trees of the classes that have been seen so far: those that wait have random neighbours and the initial margin."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import losses
from torch.utils.data import DataLoader

from pml_htl import (
    AnchorNeighborSampler,
    ClassStatistics,
    ClassTree,
    DynamicMarginMiner,
    HierarchicalTripletLoss,
    TreeRefresh,
)
from pml_htl.tree.state import NAMES

from .training import INPUTS, NUM_CLASSES, make_dataset, make_htl, make_trainer

pytestmark = pytest.mark.numerical

INITIAL = 0.37


def statistics_of(num_classes, seen, seed=0, per_class=4):
    """Of classes -3, 4, 11, ..., of which only some (positions) have samples; with the samples and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes) * 7 - 3
    own = labels[torch.as_tensor(sorted(seen))].repeat_interleave(per_class)
    embeddings = torch.nn.functional.normalize(torch.randn(len(own), 6, generator=generator))
    return ClassStatistics(labels, 6).update(embeddings, own), embeddings, own


@st.composite
def some_seen(draw):
    num_classes = draw(st.integers(3, 12))
    seen = draw(st.sets(st.integers(0, num_classes - 1), min_size=2, max_size=num_classes))
    return num_classes, seen, draw(st.integers(0, 2**16))


def same_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The tree


@given(some_seen())
def test_it_is_the_tree_of_the_classes_seen(case):
    num_classes, seen, seed = case
    statistics, embeddings, own = statistics_of(num_classes, seen, seed)
    tree = ClassTree().fit(statistics, partial=True)
    expected = ClassTree().fit_embeddings(embeddings, own)
    for name in set(NAMES) - {"waiting"}:
        value = getattr(expected, name)
        assert getattr(tree, name) is None if value is None else torch.equal(getattr(tree, name), value)
    assert tree.d_0 == expected.d_0
    waiting = sorted(set(statistics.labels.tolist()) - set(own.tolist()))
    assert (tree.waiting is None) == (not waiting) and (not waiting or tree.waiting.tolist() == waiting)
    assert tree.all_labels.tolist() == statistics.labels.tolist()
    loaded = ClassTree()
    loaded.load_state_dict(tree.state_dict())
    assert same_states(loaded, tree) and repr(loaded) == repr(tree)


def test_many_classes_by_products(monkeypatch):
    statistics, embeddings, own = statistics_of(60, range(0, 60, 2))
    monkeypatch.setattr("pml_htl.tree.merging.MAX_MATRIX_CLASSES", 10)
    tree, expected = ClassTree().fit(statistics, partial=True), ClassTree().fit_embeddings(embeddings, own)
    assert torch.equal(tree.nodes, expected.nodes) and len(tree.waiting) == 30


def test_classes_that_had_to_wait_join():
    tree = ClassTree().fit(statistics_of(8, {0, 3, 4})[0], partial=True)
    tree.fit(statistics_of(8, {0, 3, 4, 6})[0], partial=True)
    assert tree.labels.tolist() == [-3, 18, 25, 39] and len(tree.waiting) == 4
    everything = statistics_of(8, range(8))[0]
    tree.fit(everything, partial=True)
    assert tree.waiting is None and same_states(tree, ClassTree().fit(everything))


def test_what_is_too_little_for_a_tree_leaves_the_old_one():
    tree = ClassTree().fit(statistics_of(8, {0, 3})[0], partial=True)
    before = copy.deepcopy(tree)
    for statistics, partial, message in [
        (statistics_of(8, {0, 3})[0], False, "no samples of labels 4, 11, .* unless it is fitted with partial=True"),
        (statistics_of(8, {2})[0], True, "at least two classes with samples, but there are 1"),
        (ClassStatistics(range(8), 6), True, "at least two classes with samples, but there are 0"),
        (statistics_of(8, {2, 3, 5}, per_class=1)[0], True, "single sample"),
    ]:
        with pytest.raises(ValueError, match=message):
            tree.fit(statistics, partial=partial)
        assert same_states(tree, before)


def test_look_ups_say_which_classes_wait():
    tree = ClassTree().fit(statistics_of(8, {0, 3, 4})[0], partial=True)
    assert "3 classes, 5 more without samples yet" in repr(tree)
    for look_up in (lambda: tree.neighbors(4, 1), lambda: tree.merge_levels(-3, 4), lambda: tree.class_spreads([4])):
        with pytest.raises(ValueError, match=r"label 4 not among the 3 classes .* 5 more classes have had no samples yet"):
            look_up()
    tree.check_labels([4, -3])
    with pytest.raises(ValueError, match="label 5 not among the 8 classes"):
        tree.check_labels([4, 5])


def test_states_that_are_none():
    state = ClassTree().fit(statistics_of(8, {0, 3, 4})[0], partial=True).state_dict()
    waiting = state["waiting"]
    for change, message in [
        ({"waiting": waiting.flip(0)}, "waiting labels are none, or not sorted"),
        ({"waiting": waiting[:0]}, "waiting labels are none, or not sorted"),
        ({"waiting": torch.tensor([18])}, "waiting labels are among its labels"),
        ({"waiting": waiting.double()}, "waiting should be torch.int64"),
        ({"waiting": waiting.unsqueeze(0)}, "waiting is not a tensor of 1 dimensions"),
        ({"format_version": torch.tensor(1)}, "format version is 1, but its entries are those of version 6"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ClassTree().load_state_dict({**state, **change})
    without = {name: value for name, value in state.items() if name != "waiting"}
    with pytest.raises(RuntimeError, match="are those of version 4"):
        ClassTree().load_state_dict(without)
    other = ClassTree().fit(statistics_of(9, {0, 3, 4})[0], partial=True)
    with pytest.raises(RuntimeError, match="its 8 classes are not the 9 classes of this tree"):
        other.load_state_dict(state)
    ClassTree().fit(statistics_of(8, range(8))[0]).load_state_dict(state)  # the same classes, of which some wait again


def test_in_a_given_hierarchy_every_class_has_its_place():
    """Those without samples get the average spread."""
    statistics = statistics_of(4, {0, 1, 3})[0]
    tree = ClassTree.from_taxonomy(statistics.labels, [[0, 9], [0, 9], [1, 9], [1, 9]]).fit(statistics, partial=True)
    assert tree.waiting is None and tree.labels.tolist() == statistics.labels.tolist()
    assert tree.spreads[2].item() == tree.d_0 == statistics.average_spread.item()
    assert tree.spreads[[0, 1, 3]].tolist() == statistics.spreads[[0, 1, 3]].tolist()


# Margins and loss


@given(some_seen(), st.sampled_from([1, 2]), st.booleans())
def test_margins_of_pairs_with_a_class_that_waits_are_the_initial_one(case, power, training):
    num_classes, seen, seed = case
    statistics, embeddings, own = statistics_of(num_classes, seen, seed)
    options = {"initial_margin": INITIAL, "distance": _distance(power)}
    miner = DynamicMarginMiner(ClassTree().fit(statistics, partial=True), **options).train(training)
    full = DynamicMarginMiner(ClassTree().fit_embeddings(embeddings, own), **options)
    labels = statistics.labels
    expected = torch.full((num_classes, num_classes), INITIAL, dtype=torch.float64)
    for a in sorted(seen):
        for b in sorted(seen):
            expected[a, b] = full.margins(labels[a], labels[b])
    assert torch.equal(miner.margins(labels.unsqueeze(1), labels), expected)
    assert torch.equal(miner.margin_matrix(labels, labels, torch.float64, training=training), expected)
    assert torch.equal(miner.margin_matrix(labels[:2], labels, torch.float64, training=training), expected[:2])


def _distance(power):
    return DynamicMarginMiner(ClassTree()).distance if power == 2 else losses.TripletMarginLoss().distance


@pytest.mark.parametrize("options", [{}, {"temperature": 0.1}, {"swap": True}], ids=str)
def test_a_batch_of_classes_that_wait_is_one_of_a_tree_not_fitted(options):
    statistics, *_ = statistics_of(8, {0, 3, 4})
    labels = statistics.labels[[1, 2, 5]].repeat_interleave(3)
    embeddings = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    values = []
    for tree in (ClassTree(), ClassTree().fit(statistics, partial=True)):
        loss = HierarchicalTripletLoss(DynamicMarginMiner(tree, initial_margin=INITIAL), **options)
        leaf = embeddings.clone().requires_grad_()
        value = loss(leaf, labels)
        value.backward()
        values.append((value, leaf.grad))
    assert values[0][0] > 0 and all(torch.equal(*pair) for pair in zip(*values, strict=True))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.1}, {"swap": True}], ids=str)
def test_a_label_of_another_data_set_is_refused_in_training_as_ever(options):
    tree = ClassTree().fit(statistics_of(8, {0, 3, 4})[0], partial=True)
    loss = HierarchicalTripletLoss(DynamicMarginMiner(tree), **options)
    embeddings = torch.randn(4, 6)
    for labels in ([4, 4, 5, 5], [-3, -3, 5, 5], [5, 6, 7, 8]):
        with pytest.raises(ValueError, match="not among the 8 classes of the class tree"):
            loss(embeddings, labels)
        with pytest.raises(ValueError, match="not among the 8 classes of the class tree"):
            loss.miner(embeddings, labels)
    with pytest.raises(ValueError, match="label 5 not among the 8 classes"):
        loss.miner.margins([4], [5])


# The sampler


def test_who_waits_has_random_neighbours_and_is_nobodys():
    statistics, _, own = statistics_of(40, range(0, 40, 2))
    tree = ClassTree().fit(statistics, partial=True)
    sampler = AnchorNeighborSampler(
        statistics.labels.repeat(3), tree, num_anchors=2, neighborhood_size=4, samples_per_class=2, seed=0,
        batches_per_epoch=200,
    )  # fmt: skip
    labels = torch.from_numpy(sampler.labels)
    seen, anchors, companions = set(own.tolist()), [], {}
    for batch in sampler:
        groups = labels[batch].reshape(2, 4, 2)[:, :, 0]
        assert len(groups.unique()) == 8
        for anchor, *others in groups.tolist():
            anchors.append(anchor)
            companions.setdefault(anchor, set()).update(others)
            if anchor in seen:
                nearest = tree.neighbors(anchor, 10).tolist()
                assert set(others) <= set(nearest) and set(others) <= seen
    assert sorted(anchors[:40]) == statistics.labels.tolist()  # each once, whether it waits or not
    for anchor in set(statistics.labels.tolist()) - seen:
        assert len(companions[anchor]) > 15 and not companions[anchor] <= seen


def test_a_tree_of_other_classes_is_refused_also_if_some_wait():
    statistics = statistics_of(12, {0, 3, 4})[0]
    tree = ClassTree().fit(statistics, partial=True)
    options = {"num_anchors": 2, "neighborhood_size": 2, "samples_per_class": 2, "seed": 0}
    next(iter(AnchorNeighborSampler(statistics.labels, tree, **options)))
    with pytest.raises(ValueError, match="has 12 classes and the sampler has 13: only one of them knows label 1000"):
        next(iter(AnchorNeighborSampler([*statistics.labels.tolist(), 1000], tree, **options)))


# Streaming


def test_classes_join_refresh_by_refresh_and_nothing_warns():
    """A hundred classes of five samples, as products and faces have: a batch of eight classes, a refresh after each."""
    labels = torch.arange(100).repeat_interleave(5) * 2
    embeddings = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    htl = make_htl(labels, num_anchors=4, neighborhood_size=2, samples_per_class=4, batches_per_epoch=1)
    hook = htl.refresh_hook(None, mode="streaming", forget=1.0)
    batches, sizes = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            (batch,) = htl.sampler
            htl.loss(embeddings[batch].requires_grad_(), labels[batch]).backward()
            hook.refresh()
            batches += batch
            seen = labels[batches].unique()
            assert torch.equal(htl.tree.labels, seen) and htl.tree.all_labels.tolist() == labels.unique().tolist()
            expected = ClassTree().fit_embeddings(embeddings[batches], labels[batches])
            assert torch.equal(htl.tree.nodes, expected.nodes)
            torch.testing.assert_close(htl.tree.spreads, expected.spreads, rtol=0, atol=1e-9)
            sizes.append(len(seen))
    assert sizes[0] == 8 and sizes[-1] == 100 and hook.num_refreshes == 40
    assert htl.tree.waiting is None


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_trainer_the_first_refresh_has_a_tree_and_nothing_warns(workers):
    dataset = make_dataset()
    htl = make_htl(dataset.tensors[1])
    sizes = []
    hook = htl.refresh_hook(None, mode="streaming", then=lambda trainer: sizes.append(len(htl.tree.labels)))
    trainer = make_trainer(htl, dataset, hook, iterations_per_epoch=1, dataloader_num_workers=workers)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(tree|class)")
        trainer.train(num_epochs=15)
    assert sizes[0] == 9 < sizes[4] <= sizes[-1] == NUM_CLASSES and hook.num_refreshes == 15


def test_a_state_with_classes_that_wait_goes_on(tmp_path):
    """A run that is stopped while some classes wait ends as one that is not."""
    dataset = make_dataset()

    def make():
        htl = make_htl(dataset.tensors[1], batches_per_epoch=2)
        return htl, htl.refresh_hook(None, mode="streaming")

    def train(htl, hook, epochs):
        for _ in range(epochs):
            for inputs, labels in DataLoader(dataset, batch_sampler=htl.sampler):
                htl.loss(inputs.requires_grad_(), labels).backward()
            hook.refresh()

    whole, hook = make()
    train(whole, hook, 5)
    first, hook = make()
    train(first, hook, 1)
    assert first.tree.waiting is not None
    parts = {"loss": first.loss, "sampler": first.sampler, "hook": hook}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state")
    second, hook = make()
    saved = torch.load(tmp_path / "state", weights_only=False)
    for name, part in {"loss": second.loss, "sampler": second.sampler, "hook": hook}.items():
        part.load_state_dict(saved[name])
    assert same_states(second.tree, first.tree)
    train(second, hook, 4)
    assert same_states(second.tree, whole.tree)


def test_too_little_for_a_tree_is_made_up_for():
    """Batches of one sample: until a class has been there twice there is no spread; one warning says so."""
    dataset = make_dataset()
    tree, loss = ClassTree(), losses.TripletMarginLoss()
    hook = TreeRefresh(tree, None, mode="streaming", loss=loss, labels=dataset.tensors[1], every_n_epochs=1000)
    seen, fitted = [], []
    hook.then = lambda trainer: fitted.append(tree.is_fitted)
    loss.register_forward_pre_hook(lambda _, given: seen.append(given[1].item()))
    trainer = make_trainer(
        make_htl(dataset.tensors[1]), dataset, hook, loss_funcs={"metric_loss": loss}, sampler=None, batch_size=1,
        models={"trunk": torch.nn.Linear(INPUTS, 8)}, iterations_per_epoch=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="TripletMarginLoss has seen had 1 of 24 classes") as caught:
        trainer.train(num_epochs=50)
    assert len([w for w in caught if "stays as it is" in str(w.message)]) == 1
    enough = next(end for end in range(len(seen)) if 1 < len(set(seen[:end])) < end)
    assert hook.num_refreshes == 1 and fitted.index(True) == enough - 1 > 0
