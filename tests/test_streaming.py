"""A tree of the batches that the loss sees: its statistics against the definition, and the refresh without a pass."""

import copy
import gc
import itertools
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import losses
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import CascadedEmbeddings, DeepAdversarialMetricLearning
from pytorch_metric_learning.utils.logging_presets import get_hook_container, get_record_keeper
from torch.utils.data import DataLoader, TensorDataset

from pml_htl import HTL, ClassStatistics, ClassTree, HierarchicalTripletLoss, TreeRefresh
from pml_htl.losses import CrossBatchMemory
from pml_htl.refreshing.streaming import BUFFERED_BATCHES, MAX_BROKEN_BATCHES, LossWatch

from . import oracle
from .test_hooks import comes_from
from .training import NUM_CLASSES, make_dataset, make_hooks, make_htl, make_models, make_trainer

LABELS = torch.arange(12).repeat_interleave(6)


@st.composite
def streams(draw):
    """Batches of unit vectors (B, D) with labels (B,), some of few classes, in which every class is at least once."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_classes, dimensions = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    batches = [rng.integers(num_classes, size=size) for size in sizes]
    batches.append(np.arange(num_classes).repeat(draw(st.integers(1, 3))))
    return [(oracle.unit(rng.normal(size=(len(labels), dimensions))), labels * 7 - 3) for labels in batches]


def weighted_by_definition(stream, forget):
    """Every sample with its weight: old ones lose when the class is there again."""
    samples = {}
    for embeddings, labels in stream:
        for c in np.unique(labels):
            samples[c] = [(weight * forget, x) for weight, x in samples.get(c, [])]
        for x, c in zip(embeddings, labels, strict=True):
            samples[c].append((1.0, x))
    return [samples[c] for c in sorted(samples)]


def mean_squared_distance(pairs):
    total = sum(v * w for (v, _), (w, _) in pairs)
    return sum(v * w * oracle.squared_distance(x, y) for (v, x), (w, y) in pairs) / total


@given(streams(), st.sampled_from([1.0, 0.9, 0.5, 0.1]))
def test_forgetting_is_a_weighted_mean_over_pairs(stream, forget):
    statistics = ClassStatistics(stream[-1][1], stream[0][0].shape[1], forget=forget)
    for embeddings, labels in stream:
        statistics.update(torch.from_numpy(embeddings), labels)
    samples = weighted_by_definition(stream, forget)
    spreads = [mean_squared_distance(list(itertools.permutations(c, 2))) if len(c) > 1 else np.nan for c in samples]
    average = np.nan if np.isnan(spreads).all() else np.nanmean(spreads)
    np.testing.assert_allclose(statistics.spreads, np.where(np.isnan(spreads), average, spreads), rtol=0, atol=1e-9)
    np.testing.assert_allclose(statistics.average_spread, average, rtol=0, atol=1e-9)
    distances = statistics.squared_distances()
    for p, q in itertools.permutations(range(len(samples)), 2):
        expected = mean_squared_distance(list(itertools.product(samples[p], samples[q])))
        assert distances[p, q] == pytest.approx(expected, abs=1e-9)
        assert statistics.squared_distances_of(torch.tensor([[p, q]])).item() == pytest.approx(expected, abs=1e-9)
    assert statistics.counts.tolist() == [len(c) for c in samples]


def test_classes_not_in_a_batch_keep_their_sums():
    statistics = ClassStatistics([1, 2], 2, forget=0.5).update(torch.eye(2).repeat(2, 1), [1, 1, 2, 2])
    before = statistics.means[1].clone(), statistics.spreads[1].clone()
    for _ in range(50):
        statistics.update(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), [1, 1])
    assert torch.equal(statistics.means[1], before[0]) and torch.equal(statistics.spreads[1], before[1])


def test_merged_and_grown_statistics_keep_their_weights():
    x = torch.nn.functional.normalize(torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    one = ClassStatistics([1, 2], 3, forget=0.5).update(x[:4], [1, 1, 2, 2]).update(x[4:], [1, 1, 1, 1])
    two = ClassStatistics([1, 2], 3, forget=0.5).update(x[4:], [1, 2, 2, 2])
    merged = copy.deepcopy(one).merge(two)
    weights = {1: [0.5, 0.5, 1, 1, 1, 1, 1], 2: [1, 1, 1, 1, 1]}
    members = {1: [0, 1, 4, 5, 6, 7, 4], 2: [2, 3, 5, 6, 7]}
    for place, c in enumerate([1, 2]):
        samples = [(w, x[i].numpy()) for w, i in zip(weights[c], members[c], strict=True)]
        expected = mean_squared_distance(list(itertools.permutations(samples, 2)))
        assert merged.spreads[place].item() == pytest.approx(expected, abs=1e-12)
    grown = copy.deepcopy(one).add_classes([5])
    torch.testing.assert_close(grown.spreads[:2], one.spreads, rtol=0, atol=1e-12)  # norms of more rows at once


def batch(seed=0, dtype=torch.float32, requires_grad=True):
    embeddings = torch.randn(len(LABELS), 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return embeddings.requires_grad_(requires_grad), LABELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_batches", [1, BUFFERED_BATCHES, 2 * BUFFERED_BATCHES + 3])
def test_a_watch_sees_what_the_loss_is_called_with(dtype, num_batches):
    loss = losses.TripletMarginLoss()
    watch = LossWatch(loss, LABELS, 0.5)
    expected = ClassStatistics(LABELS, 8, forget=0.5)
    for seed in range(num_batches):
        embeddings, labels = batch(seed, dtype)
        before = embeddings.detach().clone()
        alone = losses.TripletMarginLoss()(embeddings, labels)
        watched = loss(embeddings, labels)
        assert torch.equal(watched, alone) and torch.equal(embeddings, before)
        expected.update(embeddings, labels)
        with torch.no_grad():
            embeddings.zero_()  # what becomes of the batch later does not matter
    found = watch.up_to_date()
    assert torch.equal(found.means, expected.means) and torch.equal(found.spreads, expected.spreads)


def test_what_does_not_train_does_not_count():
    loss = losses.TripletMarginLoss()
    watch = LossWatch(loss, LABELS, 0.5)
    loss(*batch(requires_grad=False))
    assert watch.up_to_date() is None
    reference = batch(1)
    loss(*batch(0), ref_emb=reference[0].detach(), ref_labels=reference[1])
    expected = ClassStatistics(LABELS, 8).update(*batch(0))
    assert torch.equal(watch.up_to_date().means, expected.means)
    assert (watch.up_to_date().counts > 0).all()


def test_a_memory_does_not_count():
    htl = HTL(LABELS, num_anchors=2, neighborhood_size=2, samples_per_class=3)
    hook = htl.refresh_hook(None, mode="streaming")
    memory = CrossBatchMemory(htl.loss, 8, memory_size=200)
    for seed in range(3):
        memory(*batch(seed))
    assert (hook.watch.up_to_date().counts == 3 * 6).all()


def test_a_plain_loop():
    torch.manual_seed(0)
    inputs = torch.randn(12, 5)[LABELS] + 0.3 * torch.randn(len(LABELS), 5)
    dataset = TensorDataset(inputs, LABELS)
    model = torch.nn.Linear(5, 8)
    htl = HTL(LABELS, num_anchors=2, neighborhood_size=2, samples_per_class=3, seed=0)
    refresh = htl.refresh_hook(None, mode="streaming")
    with pytest.warns(UserWarning, match="HierarchicalTripletLoss has seen had 0 of 12 classes"):
        refresh.refresh()
    assert not htl.tree.is_fitted
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        for x, y in DataLoader(dataset, batch_sampler=htl.sampler):
            optimizer.zero_grad()
            htl.loss(model(x), y).backward()
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refresh.refresh()
    assert htl.tree.is_fitted and refresh.num_refreshes >= 3
    assert torch.equal(htl.tree.spreads, refresh.watch.statistics.spreads)
    d_0 = HTL(LABELS, num_anchors=2, neighborhood_size=2, samples_per_class=3).tree.fit_embeddings(model(inputs), LABELS).d_0
    assert htl.tree.d_0 == pytest.approx(d_0, rel=0.5)  # of the last batches, not of the whole set


@pytest.mark.parametrize("how", ["htl", "triplet"])
def test_in_a_trainer(how):
    dataset = make_dataset()
    labels = dataset.tensors[1]
    htl = make_htl(labels)
    loss = htl.loss if how == "htl" else losses.TripletMarginLoss()
    iterators = []
    hook = TreeRefresh(
        htl.tree, None, mode="streaming", loss=loss, labels=labels, forget=0.9, warmup_epochs=2,
        then=lambda trainer: iterators.append(trainer.dataloader_iter),
    )  # fmt: skip
    trainer = make_trainer(htl, dataset, hook, loss_funcs={"metric_loss": loss}, iterations_per_epoch=10)
    hook.before_training(trainer)
    assert not htl.tree.is_fitted
    trainer.train(num_epochs=4)
    assert htl.tree.is_fitted and hook.num_refreshes == 3 and hook.seconds > 0
    assert hook.watch.statistics.counts.sum() == 4 * 10 * htl.batch_size
    assert len(set(map(id, iterators))) == 4  # after a refresh the loader begins anew, with the new tree


def test_beside_the_hook_container(tmp_path):
    """Its record-keeper records whatever dicts it finds in a loss; so it must find none of the watch."""
    dataset = make_dataset()
    htl = make_htl(dataset.tensors[1])
    record_keeper, _, _ = get_record_keeper(str(tmp_path / "records"), str(tmp_path / "tensorboard"))
    hooks = get_hook_container(record_keeper, primary_metric="precision_at_1", log_freq=1)
    options = {"dataloader_num_workers": 0, "data_device": torch.device("cpu")}
    tester = GlobalEmbeddingSpaceTester(end_of_testing_hook=hooks.end_of_testing_hook, **options)
    save = hooks.end_of_epoch_hook(tester, {"val": dataset}, str(tmp_path / "models"))
    hook = htl.refresh_hook(None, then=save, mode="streaming", warmup_epochs=2)
    trainer = make_trainer(htl, dataset, hook, end_of_iteration_hook=hooks.end_of_iteration_hook, iterations_per_epoch=10)
    trainer.train(num_epochs=3)
    assert htl.tree.is_fitted and list((tmp_path / "models").glob("metric_loss*"))
    assert any("d_0" in path.read_text() for path in (tmp_path / "records").glob("*.csv"))


def test_every_n_iterations():
    dataset = make_dataset()
    htl = make_htl(dataset.tensors[1])
    hook = htl.refresh_hook(None, mode="streaming", warmup_epochs=2, every_n_iterations=5)
    trainer = make_trainer(htl, dataset, hook, end_of_iteration_hook=hook.end_of_iteration_hook, iterations_per_epoch=10)
    trainer.train(num_epochs=4)
    assert hook.num_refreshes == 5


def test_labels_of_another_data_set_are_named():
    dataset = make_dataset()
    htl = make_htl(dataset.tensors[1])
    hook = TreeRefresh(htl.tree, None, mode="streaming", loss=htl.loss, labels=dataset.tensors[1] + 1)
    with pytest.raises(ValueError, match=r"labels -7, .* not among the 24 classes of the refresh"):
        make_trainer(htl, dataset, hook).train(num_epochs=1)
    assert not htl.tree.is_fitted


def test_a_watched_loss_can_be_copied_pickled_and_saved():
    htl = HTL(LABELS, num_anchors=2, neighborhood_size=2, samples_per_class=3)
    unwatched = set(htl.loss.state_dict())
    hook = htl.refresh_hook(None, mode="streaming")
    value = htl.loss(*batch())
    for twin in (copy.deepcopy(htl.loss), pickle.loads(pickle.dumps(htl.loss))):
        assert torch.equal(twin(*batch()), value)
    assert set(htl.loss.state_dict()) == unwatched
    assert (hook.watch.up_to_date().counts == 6).all()  # copies are not watched


def test_refusals():
    tree, loss = ClassTree(), losses.TripletMarginLoss()
    for arguments, error, message in [
        ({"mode": "stream"}, ValueError, "mode must be full or streaming, but it is 'stream'"),
        ({"mode": "streaming"}, ValueError, "needs the loss whose batches count"),
        ({"mode": "streaming", "loss": loss}, ValueError, "and the labels of the training set"),
        ({"mode": "streaming", "loss": "triplet", "labels": LABELS}, TypeError, "loss must be a module"),
        ({"mode": "streaming", "loss": loss, "labels": LABELS, "forget": 0}, ValueError, r"forget must be in \(0, 1\]"),
        ({"mode": "streaming", "loss": loss, "labels": LABELS, "forget": 1.5}, ValueError, "1 forgets nothing"),
        ({"mode": "streaming", "loss": loss, "labels": LABELS, "samples_per_class": 3}, ValueError, "samples_per_class"),
        ({}, ValueError, 'mode="streaming" needs none'),
    ]:
        with pytest.raises(error, match=message):
            TreeRefresh(tree, None, **arguments)
    dataset = TensorDataset(torch.randn(len(LABELS), 3), LABELS)
    with pytest.raises(ValueError, match="refresh needs the model"):
        TreeRefresh(tree, dataset).refresh()


# What a watch takes note of


class SquaredSum(torch.nn.Module):
    def forward(self, embeddings, labels):
        return (embeddings.square().sum(dim=1) * labels).sum()


def test_a_loss_that_evaluates_does_not_count():
    loss = losses.TripletMarginLoss()
    watch = LossWatch(loss, LABELS, 0.5)
    loss.eval()(*batch())
    with torch.no_grad():
        loss.train()(*batch())
    assert watch.up_to_date() is None
    loss(*batch())
    assert (watch.up_to_date().counts == 6).all()


def test_an_unknown_label_is_told_in_its_own_batch_and_no_batch_is_lost():
    loss = losses.TripletMarginLoss()
    watch = LossWatch(loss, LABELS, 0.5)
    embeddings, labels = batch()
    loss(embeddings, labels)
    with pytest.raises(ValueError, match="label 12 not among the 12 classes of the refresh"):
        loss(embeddings, labels + 1)
    with pytest.raises(ValueError, match="needs the labels of every batch"):
        loss(embeddings, indices_tuple=(torch.tensor([0]), torch.tensor([1]), torch.tensor([7])))
    loss(embeddings, labels)
    assert (watch.up_to_date().counts == 2 * 6).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_batches_that_are_not_finite_are_left_out_until_there_are_no_others(broken):
    loss = SquaredSum()
    watch = LossWatch(loss, LABELS, 0.5)
    expected = ClassStatistics(LABELS, 8, forget=0.5)

    def call(seed, is_broken):
        embeddings, labels = batch(seed, requires_grad=False)
        embeddings[3, 2] = broken if is_broken else embeddings[3, 2]
        loss(embeddings.requires_grad_(), labels)
        if not is_broken:
            expected.update(embeddings, labels)

    for seed in range(3 * MAX_BROKEN_BATCHES):
        call(seed, is_broken=seed % MAX_BROKEN_BATCHES != 0)
    found = watch.up_to_date()
    assert torch.equal(found.means, expected.means) and torch.equal(found.counts, expected.counts)
    with pytest.raises(ValueError, match=r"the last \d+ batches had embeddings that are NaN or infinite"):
        for seed in range(2 * MAX_BROKEN_BATCHES):
            call(seed, is_broken=True)
    assert torch.equal(watch.statistics.means, expected.means)


def test_the_random_state_and_the_gradient_are_not_touched():
    gradients = []
    for is_watched in (False, True):
        loss = losses.TripletMarginLoss(triplets_per_anchor=2)
        watch = LossWatch(loss, LABELS, 0.5) if is_watched else None
        torch.manual_seed(5)
        for seed in range(BUFFERED_BATCHES + 1):
            embeddings, labels = batch(seed)
            loss(embeddings, labels).backward()
        gradients.append((embeddings.grad, torch.rand(3)))
    assert watch.statistics is not None and all(map(torch.equal, *gradients))


def test_a_compiled_loss_is_watched():
    loss = SquaredSum()
    watch = LossWatch(loss, LABELS, 0.5)
    step = torch.compile(lambda embeddings, labels: loss(2 * embeddings, labels), backend="aot_eager")
    expected = ClassStatistics(LABELS, 8, forget=0.5)
    for seed in range(3):
        step(*batch(seed)).backward()
        expected.update(*batch(seed))
    torch.testing.assert_close(watch.up_to_date().means, expected.means)


# Copies, and the end of a watch


def test_copies_of_a_loss_take_no_statistics_along():
    labels = torch.arange(2000)
    loss = losses.TripletMarginLoss()
    watch = LossWatch(loss, labels, 0.5)
    loss(torch.randn(8, 64, requires_grad=True), labels[:4].repeat(2))
    watch.up_to_date()
    assert len(pickle.dumps(loss)) < 10_000 < len(pickle.dumps(watch.statistics))
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        twin(torch.randn(8, 64, requires_grad=True), labels[:4].repeat(2))
    assert watch.up_to_date().counts.sum() == 8


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_a_copied_refresh_goes_on_with_its_own_loss(twin_of):
    """As in a checkpoint of everything: the statistics so far come along."""
    htl = HTL(LABELS, num_anchors=2, neighborhood_size=2, samples_per_class=3)
    hook = htl.refresh_hook(None, mode="streaming")
    htl.loss(*batch(0))
    twin, twin_hook = twin_of((htl, hook))
    twin.loss(*batch(1))
    expected = ClassStatistics(LABELS, 8, forget=0.5).update(*batch(0))
    assert torch.equal(hook.watch.up_to_date().means, expected.means)
    assert torch.equal(twin_hook.watch.up_to_date().means, expected.update(*batch(1)).means)
    twin_hook.refresh()
    assert twin.tree.is_fitted and not htl.tree.is_fitted


def test_a_refresh_that_is_gone_leaves_nothing_to_do():
    htl = HTL(LABELS, num_anchors=2, neighborhood_size=2, samples_per_class=3)
    hook = htl.refresh_hook(None, mode="streaming")
    gone = weakref.ref(hook.watch)
    del hook
    gc.collect()
    assert gone() is None
    other = htl.refresh_hook(None, mode="streaming")
    htl.loss(*batch())
    assert (other.watch.up_to_date().counts == 6).all()


# In trainers


def train_with_records(dataset, folder, mode):
    """HTL with PML's hook container, record-keeper and tester."""
    htl = make_htl(dataset.tensors[1], collect_stats=True)
    container, _, save_and_test = make_hooks(dataset, folder)
    hook = htl.refresh_hook(dataset, mode=mode, then=save_and_test)
    options = {"end_of_iteration_hook": container.end_of_iteration_hook, "iterations_per_epoch": 10}
    make_trainer(htl, dataset, hook, **options).train(num_epochs=3)
    return htl, container


def test_the_hook_container_records_and_saves_as_with_a_full_pass(tmp_path):
    """Its record-keeper looks into all dictionaries of a loss, also torch's own of hooks."""
    dataset = make_dataset()
    headers = {}
    for mode in ("full", "streaming"):
        htl, container = train_with_records(dataset, tmp_path / mode, mode)
        files = (tmp_path / mode / "records").glob("*.csv")
        headers[mode] = {path.name: path.read_text().split("\n")[0] for path in files}
    assert headers["full"] == headers["streaming"] and len(headers["full"]) > 5
    fresh = make_htl(dataset.tensors[1])
    other = make_trainer(fresh, dataset)
    container.load_latest_saved_models(other, str(tmp_path / "streaming" / "models"), torch.device("cpu"))
    saved, loaded = (x.loss.state_dict() for x in (htl, fresh))
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("workers", [0, 2])
def test_after_a_refresh_the_next_batch_is_of_the_new_tree(workers):
    dataset = make_dataset()
    htl = make_htl(dataset.tensors[1])
    hook = htl.refresh_hook(None, mode="streaming", warmup_epochs=0, every_n_iterations=4)
    options = {"end_of_iteration_hook": hook.end_of_iteration_hook, "dataloader_num_workers": workers}
    trainer = make_trainer(htl, dataset, hook, iterations_per_epoch=12, **options)
    get_batch, of_the_tree = trainer.get_batch, []

    def checked():
        data, labels = get_batch()
        if htl.tree.is_fitted:
            of_the_tree.append(comes_from(htl.tree, labels.reshape(3, 3, 2)[:, :, 0]))
        return data, labels

    trainer.get_batch = checked
    trainer.train(num_epochs=2)
    assert hook.num_refreshes >= 3 and len(of_the_tree) >= 12 and all(of_the_tree)


def test_labels_that_the_trainer_maps():
    dataset = make_dataset()
    mapped = (dataset.tensors[1] + 7) // 3
    htl = make_htl(mapped)
    mapping = {"set_min_label_to_zero": True, "dataset_labels": dataset.tensors[1].tolist()}
    hook = htl.refresh_hook(None, mode="streaming")
    make_trainer(htl, dataset, hook, iterations_per_epoch=10, **mapping).train(num_epochs=2)
    assert htl.tree.labels.tolist() == list(range(NUM_CLASSES))


def test_a_loss_that_the_trainer_does_not_call_is_refused():
    dataset = make_dataset()
    htl = make_htl(dataset.tensors[1])
    hook = htl.refresh_hook(None, mode="streaming")
    trainer = make_trainer(htl, dataset, hook, loss_funcs={"metric_loss": losses.TripletMarginLoss()})
    with pytest.raises(ValueError, match=r"HierarchicalTripletLoss .* not among the trainer's loss_funcs \(metric_loss\)"):
        hook.before_training(trainer)
    with pytest.raises(ValueError, match="would see nothing"):
        trainer.train(num_epochs=1)
    wrapped = make_trainer(htl, dataset, hook, loss_funcs={"metric_loss": CrossBatchMemory(htl.loss, 8, 50)})
    hook.before_training(wrapped)


def adversarial(htl, dataset, hook, synth_loss):
    parts = {"metric_loss": htl.loss, "synth_loss": synth_loss, "g_adv_loss": losses.TripletMarginLoss()}
    return make_trainer(
        htl, dataset, hook, DeepAdversarialMetricLearning, loss_funcs=parts, g_triplets_per_anchor=1,
        models={**make_models(), "generator": torch.nn.Linear(48, 16)}, iterations_per_epoch=8,
        loss_weights={name: 1 for name in [*parts, "g_hard_loss", "g_reg_loss"]},
    )  # fmt: skip


def test_synthetic_embeddings_do_not_count():
    dataset = make_dataset()
    htl = make_htl(dataset.tensors[1])
    hook = htl.refresh_hook(None, mode="streaming")
    with pytest.raises(ValueError, match=r"metric_loss and synth_loss .* give each a loss of its own"):
        hook.before_training(adversarial(htl, dataset, hook, htl.loss))
    hook = htl.refresh_hook(None, mode="streaming")
    adversarial(htl, dataset, hook, HierarchicalTripletLoss(htl.miner)).train(num_epochs=2)
    assert hook.watch.statistics.counts.sum() == 2 * 8 * htl.batch_size and htl.tree.is_fitted


def test_each_slice_of_cascaded_embeddings_has_its_own_statistics():
    dataset = make_dataset()
    first, second = make_htl(dataset.tensors[1]), make_htl(dataset.tensors[1])
    hook = first.refresh_hook(None, mode="streaming", then=second.refresh_hook(None, mode="streaming"))
    parts = {"metric_loss_0": first.loss, "metric_loss_1": second.loss}
    options = {"embedding_sizes": [5, 3], "iterations_per_epoch": 10}
    make_trainer(first, dataset, hook, CascadedEmbeddings, loss_funcs=parts, **options).train(num_epochs=2)
    assert [hook.watch.statistics.embedding_size, hook.then.watch.statistics.embedding_size] == [5, 3]
    assert first.tree.is_fitted and second.tree.is_fitted


def test_a_watch_that_goes_on_knows_the_size_of_an_embedding():
    watch, other = (LossWatch(losses.TripletMarginLoss(), LABELS, 0.5) for _ in range(2))
    watch.loss(*batch(0))
    other.load_state_dict(watch.state_dict())
    embeddings, labels = batch(1)
    with pytest.raises(ValueError, match=r"shape \(B, 8\)"):
        other.loss(embeddings[:, :5], labels)
