import io
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from pml_htl import AnchorNeighborSampler, ClassTree, DynamicMarginMiner

from .examples import make_embeddings


def fitted(sizes, seed=0, kind="random", **kwargs):
    embeddings, labels = make_embeddings(kind, sizes, 6, seed)
    return ClassTree(**kwargs).fit_embeddings(torch.from_numpy(embeddings), labels), labels


def make(tree, labels, anchors=2, size=3, samples=2, **kwargs):
    return AnchorNeighborSampler(
        labels, tree, num_anchors=anchors, neighborhood_size=size, samples_per_class=samples, **{"seed": 0, **kwargs}
    )


def groups(sampler, batch):
    """(num_anchors, neighborhood_size, samples_per_class) labels."""
    shape = sampler.num_anchors, sampler.neighborhood_size, sampler.samples_per_class
    return np.asarray(sampler.labels)[batch].reshape(shape)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(st.integers(2, 20), shapes, st.booleans(), st.integers(0, 99))
def test_every_batch_is_what_the_method_says(num_classes, shape, is_fitted, seed):
    anchors, size, samples = shape
    if anchors * size > num_classes:
        return
    tree, labels = fitted([1 + (c * 7 + seed) % 5 for c in range(num_classes)], seed)
    sampler = make(tree if is_fitted else ClassTree(), labels, anchors, size, samples, batches_per_epoch=25, seed=seed)
    counts = Counter(labels.tolist())
    times_anchor = Counter(dict.fromkeys(counts, 0))
    for batch in sampler:
        drawn = groups(sampler, batch)
        assert (drawn == drawn[:, :, :1]).all()  # the samples of a class are of that class
        classes = drawn[:, :, 0]
        assert len(set(classes.ravel().tolist())) == classes.size  # all classes distinct
        for label, indices in zip(classes.ravel(), np.reshape(batch, (-1, samples)), strict=True):
            assert len(set(indices)) == samples or counts[label] < samples  # without replacement where possible
        for anchor in classes[:, 0].tolist():
            times_anchor[anchor] += 1
            assert max(times_anchor.values()) - min(times_anchor.values()) <= 1  # once each before any twice
        if is_fitted:
            for anchor, *neighbors in classes.tolist():
                nearest = tree.neighbors(anchor, num_classes - 1).tolist()
                places = [nearest.index(neighbor) for neighbor in neighbors]
                assert places == sorted(places)  # nearest first,
                passed_over = set(nearest[: places[-1] + 1] if places else []) - set(neighbors)
                assert passed_over <= set(classes.ravel().tolist())  # and nearer ones only left out if in the batch


def test_a_skipped_anchor_comes_first_in_the_next_batch():
    tree, labels = fitted([4] * 12, kind="clustered")
    sampler = make(tree, labels, anchors=3, size=3, batches_per_epoch=1)
    nearest = tree.nearest_classes.numpy()
    walk = [0, nearest[0, 0], *(place for place in range(1, 12) if place != nearest[0, 0])]
    sampler.load_state_dict({**sampler.state_dict(), "walk": np.array(walk)})
    first, second = next(iter(sampler)), next(iter(sampler))
    expected, taken, skipped = [], set(), []
    for place in walk:
        if len(expected) == 3:
            break
        if place in taken:
            skipped.append(place)
            continue
        near = [p for p in nearest[place].tolist() if p not in taken][:2]
        taken |= {place, *near}
        expected.append([place, *near])
    assert skipped[0] == nearest[0, 0]
    assert np.searchsorted(sampler.classes, groups(sampler, first)[:, :, 0]).tolist() == expected
    assert np.searchsorted(sampler.classes, groups(sampler, second)[0, 0, 0]) == skipped[0]


def test_near_classes_make_more_active_triplets_than_random_ones():
    tree, labels = fitted([6] * 40, kind="clustered", seed=3)
    embeddings, _ = make_embeddings("clustered", [6] * 40, 6, 3)
    embeddings, all_labels = torch.from_numpy(embeddings), torch.from_numpy(labels)
    miner = DynamicMarginMiner(ClassTree(), initial_margin=0.1)

    def active(sampler):
        return np.mean([len(miner(embeddings[batch], all_labels[batch])[0]) for batch in sampler])

    near = active(make(tree, labels, anchors=4, size=4, samples=3, batches_per_epoch=20))
    random = active(make(ClassTree(), labels, anchors=4, size=4, samples=3, batches_per_epoch=20))
    assert near > 1.2 * random > 0


def test_a_refreshed_tree_counts_from_the_next_batch():
    tree, labels = fitted([4] * 15)
    sampler = make(tree, labels, anchors=2, size=4)
    batches = iter(sampler)
    next(batches)
    other, _ = make_embeddings("random", [4] * 15, 6, 77)
    tree.fit_embeddings(torch.from_numpy(other), labels)
    anchor, *neighbors = groups(sampler, next(batches))[0, :, 0].tolist()
    assert neighbors == tree.neighbors(anchor, 3).tolist()


def test_the_same_seed_gives_the_same_batches():
    tree, labels = fitted([4] * 15)
    for is_fitted in (True, False):
        one, other = (make(tree if is_fitted else ClassTree(), labels, seed=5) for _ in range(2))
        epochs = [[list(sampler) for _ in range(3)] for sampler in (one, other)]
        assert epochs[0] == epochs[1]
        assert epochs[0][0] != epochs[0][1] != epochs[0][2]  # every iter() is another epoch
    assert list(make(tree, labels, seed=5)) != list(make(tree, labels, seed=6))
    torch.manual_seed(1)
    first = list(make(tree, labels, seed=None))
    torch.manual_seed(1)
    assert first == list(make(tree, labels, seed=None))
    assert first != list(make(tree, labels, seed=None))


def test_set_epoch_repeats_an_epoch():
    tree, labels = fitted([4] * 15)
    sampler = make(tree, labels)
    epochs = {}
    for epoch in (2, 0, 1):
        sampler.set_epoch(epoch)
        epochs[epoch] = list(sampler)
    sampler.set_epoch(2)
    next(iter(sampler))
    for epoch, batches in epochs.items():
        sampler.set_epoch(epoch)
        assert list(sampler) == batches
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_set_epoch_leaves_an_iteration_that_is_under_way_as_it_is():
    tree, labels = fitted([4] * 15)
    sampler = make(tree, labels)
    epochs = {}
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        epochs[epoch] = list(sampler)
    for next_epoch in (1, 2):
        sampler.set_epoch(1)
        under_way = iter(sampler)
        first = next(under_way)
        sampler.set_epoch(next_epoch)
        assert [first, *under_way] == epochs[1]
        assert sampler.state_dict()["batches"] == 0
        assert list(sampler) == epochs[next_epoch]


def test_neighbors_that_the_tree_does_not_keep_are_filled_up():
    tree, labels = fitted([3] * 12, max_neighbors=2)
    sampler = make(tree, labels, anchors=2, size=6, samples=1, batches_per_epoch=10)
    for batch in sampler:
        assert sorted(np.asarray(labels)[batch].tolist()) == sampler.classes.tolist()


@pytest.mark.parametrize("persistent", [False, True])
def test_loaders_with_workers_give_the_same_batches(persistent):
    tree, labels = fitted([5] * 10)
    dataset = TensorDataset(torch.arange(len(labels)))

    def epochs(num_workers, with_set_epoch):
        sampler = make(tree, labels)
        persistent_workers = persistent and num_workers > 0
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, persistent_workers=persistent_workers)
        for epoch in range(3):
            if with_set_epoch:
                sampler.set_epoch(epoch)
            yield [batch[0].tolist() for batch in loader]

    for with_set_epoch in (False, True):
        assert list(epochs(0, with_set_epoch)) == list(epochs(2, with_set_epoch))


def test_it_is_a_batch_sampler_for_loaders():
    tree, labels = fitted([5] * 10)
    sampler = make(tree, labels)
    assert isinstance(sampler, BatchSampler)
    assert sampler.batch_size == 12 and sampler.drop_last is True and len(sampler.sampler) == 50
    assert len(sampler) == 50 // 12 and len(list(sampler)) == len(sampler)
    assert len(make(tree, labels[:], batches_per_epoch=7)) == 7
    assert len(make(ClassTree(), labels[:6], anchors=1, size=2, samples=50)) == 1  # never empty
    loader = DataLoader(TensorDataset(torch.as_tensor(labels)), batch_sampler=sampler, num_workers=2)
    assert [len(batch[0]) for batch in loader] == [12] * len(sampler)
    assert all(isinstance(index, int) for index in next(iter(sampler)))
    tensor, array = (make(ClassTree(), kind(labels.tolist())) for kind in (torch.tensor, np.array))
    assert list(islice(tensor, 3)) == list(islice(array, 3))


def test_refusals():
    tree, labels = fitted([3] * 6)
    with pytest.raises(ValueError, match="needs 8 distinct classes, but the data set has 6"):
        make(tree, labels, anchors=2, size=4)
    with pytest.raises(ValueError, match="empty"):
        make(tree, [])
    with pytest.raises(ValueError, match="single class"):
        make(tree, [1, 1, 1], anchors=1, size=1)
    with pytest.raises(ValueError, match="one per sample"):
        make(tree, [[1, 2], [3, 4]])
    with pytest.raises(TypeError, match="integers"):
        make(tree, ["a", "b"])
    with pytest.raises(TypeError, match="ClassTree"):
        make(None, labels)
    for name in ("num_anchors", "neighborhood_size", "samples_per_class", "batches_per_epoch", "seed"):
        arguments = {"num_anchors": 1, "neighborhood_size": 1, "samples_per_class": 1, name: -1}
        with pytest.raises(ValueError, match=name):
            AnchorNeighborSampler(labels, tree, **arguments)
        with pytest.raises(TypeError, match=name):
            AnchorNeighborSampler(labels, tree, **{**arguments, name: 1.5})
    other = [*labels.tolist(), 10**7]
    with pytest.raises(ValueError, match="only one of them knows label 10000000"):
        next(iter(make(tree, other)))


class TestGoingOn:
    """`state_dict` and `load_state_dict`: the same batches as without an interruption."""

    @given(st.integers(2, 25), shapes, st.booleans(), st.integers(0, 99), st.integers(0, 60), st.booleans())
    def test_anywhere(self, num_classes, shape, is_fitted, seed, stop, by_epoch):
        anchors, size, samples = shape
        if anchors * size > num_classes:
            return
        tree, labels = fitted([2] * num_classes, seed)
        one, other = (
            make(tree if is_fitted else ClassTree(), labels, anchors, size, samples, batches_per_epoch=20, seed=s)
            for s in (seed, seed + 1)
        )

        def batches(sampler, first_epoch=0):
            for epoch in range(first_epoch, 4):
                if by_epoch:
                    sampler.set_epoch(epoch)
                yield from sampler

        running = batches(one)
        for _ in range(stop):
            next(running)
        saved = io.BytesIO()
        torch.save(one.state_dict(), saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        list(islice(other, 7))
        other.load_state_dict(state)
        rest = list(running)
        going_on = batches(other, first_epoch=stop // 20 if stop % 20 or not by_epoch else (stop - 1) // 20 + 1)
        assert rest == list(islice(going_on, len(rest))) and len(rest) == 80 - stop

    def test_behind_workers_that_draw_ahead(self):
        tree, labels = fitted([4] * 12)
        sampler = make(tree, labels, batches_per_epoch=30)
        whole = make(tree, labels, batches_per_epoch=30)
        expected = [*whole, *whole]
        dataset = TensorDataset(torch.arange(len(labels)))
        loader = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=2))
        consumed = [next(loader)[0].tolist() for _ in range(5)]
        assert consumed == expected[:5] and sampler.state_dict()["batches"] > 5
        other = make(tree, labels, batches_per_epoch=30)
        other.load_state_dict(sampler.state_dict(batches_consumed=5))
        assert [*other, *other] == expected[5:]
        with pytest.raises(ValueError, match=r"batches_consumed must be one of the 0 \.\. 9 batches of this epoch"):
            sampler.state_dict(batches_consumed=10)

    def test_with_a_tree_that_changed_in_between(self):
        tree, labels = fitted([3] * 12, seed=0)
        sampler, other = (make(tree, labels, batches_per_epoch=10) for _ in range(2))
        running = iter(sampler)
        for _ in range(4):
            next(running)
        tree.fit_embeddings(torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(1)), labels)
        other.load_state_dict(sampler.state_dict())
        assert list(running) == list(other)

    def test_foreign_states_are_refused(self):
        tree, labels = fitted([3] * 12)
        sampler = make(tree, labels)
        expected = list(make(tree, labels))
        state = make(tree, labels).state_dict()
        for change, error, message in [
            ({"walk": None}, TypeError, "integers"),
            ({"walk": torch.tensor([3, 3])}, ValueError, "distinct classes below 12"),
            ({"skipped": [12]}, ValueError, "distinct classes below 12"),
            ({"generator": {"bit_generator": "MT19937"}}, ValueError, "none of NumPy's"),
            ({"batches": -1}, ValueError, "batches of the state must be an integer of at least 0"),
            ({"made_for": {**state["made_for"], "classes": 13}}, ValueError, "with classes=13, but this one has classes=12"),
            ({"made_for": None}, ValueError, "has batches, epoch"),
            ({"more": 1}, ValueError, "but this has .*more"),
        ]:
            with pytest.raises(error, match=message):
                sampler.load_state_dict({**state, **change})
        with pytest.raises(ValueError, match="but this has list"):
            sampler.load_state_dict([])
        with pytest.raises(ValueError, match="num_anchors=2, but this one has num_anchors=1"):
            make(tree, labels, anchors=1).load_state_dict(state)
        assert list(sampler) == expected


@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_processes_share_the_batches_of_one(num_replicas, groups_each, size, seed):
    tree, labels = fitted([3] * 40, seed)
    arguments = {"anchors": num_replicas * groups_each, "size": size, "batches_per_epoch": 6, "seed": seed}
    one = make(tree, labels, **arguments)
    parts = [make(tree, labels, **arguments, num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)]
    assert {part.batch_size for part in parts} == {one.batch_size // num_replicas} and len(parts[0]) == len(one)
    for _ in range(2):
        for joint, *shares in zip(one, *parts, strict=True):
            assert [len(share) for share in shares] == [parts[0].batch_size] * num_replicas
            assert joint == [index for share in shares for index in share]
    state = parts[0].state_dict()
    assert all(str(part.state_dict()) == str(state) for part in [*parts, one])


def test_processes_that_cannot_share():
    tree, labels = fitted([3] * 12)
    for wrong, message in [
        ({"num_replicas": 3, "rank": 0}, "3 processes cannot share 2 anchors evenly.*make num_anchors a multiple of 3"),
        ({"num_replicas": 2, "rank": 2}, "rank must be below num_replicas=2, but it is 2"),
        ({"rank": 1}, "rank must be below num_replicas=1"),
        ({"num_replicas": 2, "rank": 0, "seed": None}, "2 processes draw parts of one batch: give them the same seed"),
        ({"num_replicas": 0}, "num_replicas must be an integer of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(tree, labels, **wrong)
