import copy

import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import TensorDataset

from pml_htl import ClassStatistics, ClassTree, TreeRefresh
from pml_htl.distributed import Ranks
from pml_htl.refreshing.embedding import collect_statistics

from .training import PER_CLASS, make_dataset, make_hooks, make_htl, make_trainer


@pytest.fixture
def dataset():
    return make_dataset()


def comes_from(tree, classes):
    """Whether the groups of a batch, (num_anchors, neighborhood_size) labels, are near by this tree."""
    inside = set(classes.ravel().tolist())
    for anchor, *neighbors in classes.tolist():
        if tree.waiting is not None and anchor in tree.waiting:  # its neighbours are random
            continue
        nearest = tree.neighbors(anchor, len(tree.labels) - 1).tolist()
        passed_over = set(nearest[: max(map(nearest.index, neighbors)) + 1]) - set(neighbors)
        if not passed_over <= inside:
            return False
    return True


def record_batches(trainer):
    """Makes the trainer keep the class groups of every batch it trains on, epoch by epoch."""
    epochs = {}
    get_batch = trainer.get_batch

    def recording():
        data, labels = get_batch()
        epochs.setdefault(trainer.epoch, []).append(labels.reshape(3, 3, 2)[:, :, 0])
        return data, labels

    trainer.get_batch = recording
    return epochs


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_after_a_refresh_come_from_the_new_tree(dataset, workers):
    """Workers have batches of the old tree ready when the refresh comes; none of them may be trained on."""
    htl = make_htl(dataset.tensors[1])
    trees = {}

    def scramble(trainer):  # the next refresh sees a network that has changed beyond recognition
        trees[trainer.epoch + 1] = copy.deepcopy(htl.tree)
        for parameter in trainer.models["trunk"].parameters():
            torch.nn.init.normal_(parameter)

    hook = htl.refresh_hook(dataset, then=scramble)
    trainer = make_trainer(htl, dataset, hook, dataloader_num_workers=workers)
    batches = record_batches(trainer)
    trainer.train(num_epochs=4)
    assert hook.num_refreshes == 4 and hook.seconds > 0
    for epoch in (2, 3, 4):
        assert len(batches[epoch]) == 6
        assert all(comes_from(trees[epoch], classes) for classes in batches[epoch])
    for epoch in (3, 4):  # the check can tell: by the tree before they are not near
        assert not any(comes_from(trees[epoch - 1], classes) for classes in batches[epoch])
    assert not all(comes_from(trees[2], classes) for classes in batches[1])  # random before the first refresh


def refreshed_epochs(htl, dataset, num_epochs, **kwargs):
    fitted_after = []
    versions = []

    def note(trainer):
        if htl.tree.is_fitted and (not versions or versions[-1] is not htl.tree.nodes):
            versions.append(htl.tree.nodes)
            fitted_after.append(trainer.epoch)

    hook = htl.refresh_hook(dataset, then=note, **kwargs)
    make_trainer(htl, dataset, hook).train(num_epochs=num_epochs)
    return fitted_after


def test_warmup_and_interval(dataset):
    assert refreshed_epochs(make_htl(dataset.tensors[1]), dataset, 3) == [1, 2, 3]
    assert refreshed_epochs(make_htl(dataset.tensors[1]), dataset, 6, warmup_epochs=2, every_n_epochs=3) == [2, 5]
    assert refreshed_epochs(make_htl(dataset.tensors[1]), dataset, 2, warmup_epochs=3) == []


def test_before_training(dataset):
    for warmup_epochs in (0, 1):
        htl = make_htl(dataset.tensors[1])
        hook = htl.refresh_hook(dataset, warmup_epochs=warmup_epochs)
        trainer = make_trainer(htl, dataset, hook)
        hook.before_training(trainer)
        assert htl.tree.is_fitted == (warmup_epochs == 0)
        if warmup_epochs == 0:
            tree = copy.deepcopy(htl.tree)
            batches = record_batches(trainer)
            trainer.train(num_epochs=1)
            assert all(comes_from(tree, classes) for classes in batches[1])


def test_the_tree_is_that_of_the_embeddings(dataset):
    htl = make_htl(dataset.tensors[1])
    hook = htl.refresh_hook(dataset, batch_size=17)
    trainer = make_trainer(htl, dataset, hook)
    trainer.train(num_epochs=1)
    trunk, embedder = (trainer.models[name].eval() for name in ("trunk", "embedder"))
    with torch.no_grad():
        expected = ClassTree().fit_embeddings(embedder(trunk(dataset.tensors[0])), dataset.tensors[1])
    assert torch.equal(htl.tree.nodes, expected.nodes) and torch.equal(htl.tree.labels, expected.labels)
    torch.testing.assert_close(htl.tree.spreads, expected.spreads, rtol=0, atol=1e-6)

    plain = ClassTree()
    TreeRefresh(plain, dataset).refresh(torch.nn.Sequential(trunk, embedder))
    assert torch.equal(plain.nodes, expected.nodes)


def test_modes_and_random_numbers_are_as_before(dataset):
    htl = make_htl(dataset.tensors[1])
    trainer = make_trainer(htl, dataset, htl.refresh_hook(dataset))
    trainer.epoch, trunk = 1, trainer.models["trunk"]
    trunk.train()
    trunk[1].eval()  # a frozen batch norm
    running = trunk[1].running_mean.clone()
    modes = [module.training for module in trunk.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    trainer.end_of_epoch_hook(trainer)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in trunk.modules()] == modes
    assert torch.equal(trunk[1].running_mean, running)
    assert htl.tree.is_fitted


class Broken(TensorDataset):
    def __getitem__(self, index):
        if index == 100:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_a_failed_refresh_leaves_the_old_tree_and_modes(dataset):
    htl = make_htl(dataset.tensors[1])
    trainer = make_trainer(htl, dataset, htl.refresh_hook(dataset))
    trainer.train(num_epochs=1)
    before = copy.deepcopy(htl.tree.state_dict())
    trainer.set_to_train()
    with pytest.raises(OSError, match="disk"):
        htl.refresh_hook(Broken(*dataset.tensors), batch_size=32)(trainer)
    nan = TensorDataset(torch.full_like(dataset.tensors[0], torch.nan), dataset.tensors[1])
    with pytest.raises(ValueError, match="NaN or infinite"):
        htl.refresh_hook(nan)(trainer)
    with pytest.raises(ValueError, match="empty"):
        htl.refresh_hook(TensorDataset(*(tensor[:0] for tensor in dataset.tensors)))(trainer)
    with pytest.raises(ValueError, match="the data set lacks label 62"):
        htl.refresh_hook(TensorDataset(*(tensor[:-PER_CLASS] for tensor in dataset.tensors)))(trainer)
    assert all(torch.equal(before[name], value) for name, value in htl.tree.state_dict().items())
    assert all(module.training for model in trainer.models.values() for module in model.modules())


def test_without_our_sampler_the_classes_are_those_of_the_data_set(dataset):
    from pytorch_metric_learning.samplers import MPerClassSampler

    htl = make_htl(dataset.tensors[1])
    sampler = MPerClassSampler(dataset.tensors[1], 2, htl.batch_size, 18 * 20)
    trainer = make_trainer(htl, dataset, htl.refresh_hook(dataset, batch_size=20), sampler=sampler)
    trainer.train(num_epochs=2)
    assert htl.tree.labels.tolist() == dataset.tensors[1].unique().tolist()


def test_the_verdict_of_the_other_hook_is_passed_on(dataset):
    htl = make_htl(dataset.tensors[1])
    hook = htl.refresh_hook(dataset, then=lambda trainer: trainer.epoch < 2)
    trainer = make_trainer(htl, dataset, hook)
    trainer.train(num_epochs=5)
    assert trainer.epoch == 2 and hook.num_refreshes == 2


def test_bad_arguments(dataset):
    for arguments, error in [
        ({"tree": None}, TypeError),
        ({"then": 3}, TypeError),
        ({"warmup_epochs": -1}, ValueError),
        ({"every_n_epochs": 0}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"num_workers": -1}, ValueError),
    ]:
        with pytest.raises(error, match=next(iter(arguments))):
            TreeRefresh(**{"tree": ClassTree(), "dataset": dataset, **arguments})


def train_with_records(dataset, folder, num_epochs=3):
    """HTL with PML's hook container, record-keeper and tester."""
    np.random.seed(0)
    htl = make_htl(dataset.tensors[1], collect_stats=True)
    container, tester, save_and_test = make_hooks(dataset, folder)
    trainer = make_trainer(
        htl,
        dataset,
        htl.refresh_hook(dataset, then=save_and_test),
        end_of_iteration_hook=container.end_of_iteration_hook,
    )
    trainer.train(num_epochs=num_epochs)
    return htl, trainer, container, tester


def test_the_hook_container_saves_the_new_tree_and_loads_it_again(dataset, tmp_path):
    htl, trainer, container, _ = train_with_records(dataset, tmp_path)
    fresh = make_htl(dataset.tensors[1])
    other = make_trainer(fresh, dataset)
    assert container.load_latest_saved_models(other, str(tmp_path / "models"), torch.device("cpu")) == 4
    assert fresh.tree.is_fitted
    saved, loaded = (x.loss.state_dict() for x in (htl, fresh))
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    for name, model in trainer.models.items():
        assert all(map(torch.equal, model.state_dict().values(), other.models[name].state_dict().values()))
    recorded = pandas.read_csv(tmp_path / "records" / "metric_loss_HierarchicalTripletLoss.csv").margin
    assert recorded[0] == 0.2 and recorded.nunique() > 2  # the initial margin, then means of the dynamic ones


def test_two_trainings_with_the_same_seed_give_the_same_numbers(dataset, tmp_path):
    histories, weights, trees = [], [], []
    for name in ("one", "other"):
        htl, trainer, container, tester = train_with_records(dataset, tmp_path / name)
        histories.append((container.get_accuracy_history(tester, "val"), container.get_loss_history()))
        weights.append(list(trainer.models["trunk"].state_dict().values()))
        trees.append(list(htl.tree.state_dict().values()))
    assert histories[0] == histories[1]
    assert len(histories[0][0]["epoch"]) == 3
    assert all(map(torch.equal, *weights)) and all(map(torch.equal, *trees))


def test_statistics_of_batches_are_those_of_all_samples_whatever_the_order(monkeypatch):
    """And classes that come one after the other are copied a few times each, not in every batch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(640).repeat_interleave(2)
    embeddings = torch.randn(len(labels), 4, generator=generator)
    expected = ClassStatistics(labels, 4).update(embeddings, labels)
    copied = []
    add_classes = ClassStatistics.add_classes
    monkeypatch.setattr(
        ClassStatistics,
        "add_classes",
        lambda self, others: copied.append(len(self.labels) + len(others)) or add_classes(self, others),
    )
    for order in (torch.arange(len(labels)), torch.randperm(len(labels), generator=generator)):
        copied.clear()
        batches = [(embeddings[part], labels[part]) for part in order.split(8)]
        found = collect_statistics([], lambda inputs: inputs, batches, Ranks.alone())
        assert torch.equal(found.labels, expected.labels) and torch.equal(found.counts, expected.counts)
        torch.testing.assert_close(found.means, expected.means)
        torch.testing.assert_close(found.spreads, expected.spreads)
    copied.clear()
    batches = [(embeddings[part], labels[part]) for part in torch.arange(len(labels)).split(8)]
    collect_statistics([], lambda inputs: inputs, batches, Ranks.alone())
    assert sum(copied) < 640 * 4 * 10  # log2(640) is about 10; in every batch it would be 640 * 160 / 2
