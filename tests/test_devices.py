"""Devices without float64: the same numbers as on the host, and no float64 is made there."""

import copy

import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance
from torch.utils.data import DataLoader

from pml_htl import ClassStatistics, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.common.precision import widest_float
from pml_htl.losses import CrossBatchMemory
from pml_htl.refreshing.streaming import LossWatch
from pml_htl.tree.state import NAMES

from .no_float64 import DEVICE, DeviceMode
from .test_losses import REDUCERS, TUPLES, batch
from .test_miners import TYPES
from .training import INPUTS, make_dataset, make_htl, same_tree

pytestmark = pytest.mark.numerical

# Of the six classes of `batch`.
SPECIES, ANCESTORS = list(range(6)), [[0, 0], [0, 0], [1, 0], [1, 0], [2, 0], [2, 0]]
OPTIONS = {
    "sums": {},
    "temperature": {"temperature": 0.05},
    "smooth": {"smooth_loss": True},
    "swap": {"swap": True},
    "temperature and swap": {"swap": True, "temperature": 0.05},
}


def fitted(**kwargs):
    embeddings, labels = batch()
    return ClassTree(**kwargs).fit_embeddings(embeddings, labels), embeddings, labels


def make(tree, power=2, **kwargs):
    return HierarchicalTripletLoss(DynamicMarginMiner(tree, distance=LpDistance(power=power)), collect_stats=True, **kwargs)


def assert_close(there, here, atol=2e-6):
    assert there.device == DEVICE and there.dtype == (torch.float32 if here.is_floating_point() else here.dtype)
    torch.testing.assert_close(there.cpu().double(), here.double(), rtol=0, atol=atol)


def assert_same_call(loss, embeddings, labels, device, make_tuple=None, **ref):
    """Value, gradient and records of a call on the device are those on the host."""
    results = []
    for place in ("cpu", device):
        leaf, there = embeddings.clone().to(place).requires_grad_(), labels.to(place)
        mined = None if make_tuple is None else make_tuple(leaf.detach(), there)
        value = loss(leaf, there, mined, **{name: part.to(place) for name, part in ref.items()})
        value.backward()
        margin = loss.margin.cpu() if isinstance(loss.margin, torch.Tensor) else loss.margin
        results.append((value.detach(), leaf.grad, [float(margin), loss.min_margin, loss.max_margin, loss.active_share]))
    (here, own, records), (value, gradient, others) = results
    size = max(1.0, float(here.abs()), float(own.abs().max()))
    assert_close(value, here, 1e-5 * size)
    assert_close(gradient, own, 1e-5 * size)
    assert others == pytest.approx(records, abs=2e-6)


def test_the_stand_in_refuses_float64(poor_device):
    values = torch.ones(3, device=poor_device)
    for make_wide in (
        values.double,
        lambda: values.sum(dtype=torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=poor_device),
        lambda: torch.zeros(2, dtype=torch.float64).to(poor_device),
        lambda: torch.arange(2.0, dtype=torch.float64).tolist() and torch.arange(2.0, device=poor_device).double(),
    ):
        with pytest.raises(TypeError, match=r"the device has no torch\.float64"):
            make_wide()
    for mix in (lambda: values + torch.ones(3), lambda: torch.ones(3)[values.long()]):
        with pytest.raises(RuntimeError, match="two devices"):
            mix()
    assert values.cpu().double().tolist() == [1, 1, 1] and (2 * values).sum().item() == 6


def test_which_devices_have_float64(monkeypatch):
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda", 0)) == torch.float64
    for has_fp64, expected in ((True, torch.float64), (False, torch.float32)):  # Intel's GPUs say so themselves
        properties = type("Properties", (), {"has_fp64": has_fp64})
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, found=properties: found)
        assert widest_float(torch.device("xpu")) == expected


@pytest.mark.parametrize("power", [1, 2])
def test_margins_agree_to_1e_6(poor_device, power):
    tree, _, labels = fitted()
    miner = DynamicMarginMiner(tree, distance=LpDistance(power=power))
    there = labels.to(poor_device)
    assert_close(miner.margins(there.unsqueeze(1), there), miner.margins(labels.unsqueeze(1), labels), 1e-6)
    unfitted = DynamicMarginMiner(ClassTree()).margins(there, there)
    assert unfitted.dtype == torch.float32 and unfitted.device == poor_device


def test_lookups_agree(poor_device):
    for tree in (fitted()[0], ClassTree.from_taxonomy(SPECIES, ANCESTORS).fit_embeddings(torch.randn(18, 8), SPECIES * 3)):
        labels = tree.labels
        there = labels.to(poor_device)
        for name in ("merge_levels", "merge_thresholds", "cophenetic_distances"):
            assert_close(getattr(tree, name)(there.unsqueeze(1), there), getattr(tree, name)(labels.unsqueeze(1), labels))
        assert_close(tree.class_spreads(there), tree.class_spreads(labels))
        assert_close(tree.neighbors(there, 2), tree.neighbors(labels, 2))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("power", [1, 2])
def test_the_loss(poor_device, options, power):
    tree, embeddings, labels = fitted()
    assert_same_call(make(tree, power, **OPTIONS[options]), embeddings, labels, poor_device)


@pytest.mark.parametrize("name", sorted(REDUCERS.keys() - {"do-nothing", "per-anchor", "divisor"}))
@pytest.mark.parametrize("tuples", [None, "triplets", "pairs"])
def test_reducers_tuples_and_references(poor_device, name, tuples):
    tree, embeddings, labels = fitted()
    make_tuple = None if tuples is None else TUPLES[tuples]
    for ref in ({}, {"ref_emb": embeddings.flip(0), "ref_labels": labels.flip(0)}):
        loss = make(tree, reducer=REDUCERS[name]())
        assert_same_call(loss, embeddings, labels, poor_device, make_tuple if not ref else None, **ref)


def test_random_triplets(poor_device):
    tree, embeddings, labels = fitted()
    value = make(tree, triplets_per_anchor=2)(embeddings.to(poor_device), labels.to(poor_device))
    assert value.device == poor_device and value.dtype == torch.float32 and value > 0


@pytest.mark.parametrize("kind", TYPES)
def test_the_miner(poor_device, kind):
    tree, embeddings, labels = fitted()
    miner = DynamicMarginMiner(tree, type_of_triplets=kind, collect_stats=True)
    here, expected = miner(embeddings, labels), [miner.pos_pair_dist, miner.neg_pair_dist, miner.avg_triplet_margin]
    there = miner(embeddings.to(poor_device), labels.to(poor_device))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))
    assert [miner.pos_pair_dist, miner.neg_pair_dist, miner.avg_triplet_margin] == pytest.approx(expected, abs=1e-5)


def test_wrappers(poor_device):
    tree, embeddings, labels = fitted()
    there = embeddings.to(poor_device), labels.to(poor_device)
    for wrap in (
        lambda loss: CrossBatchMemory(loss, 16, 60),
        lambda loss: CrossBatchMemory(loss, 16, 60, miner=miners.MultiSimilarityMiner()),
        lambda loss: losses.MultipleLosses([loss, losses.ContrastiveLoss()]),
    ):
        here, moved = wrap(make(tree)), wrap(make(tree)).to(poor_device)
        for _ in range(3):
            assert_close(moved(*there), here(embeddings, labels), 1e-5)


# The state


@pytest.mark.parametrize("is_given", [False, True])
def test_a_tree_that_moves_there_keeps_every_digit(poor_device, is_given):
    embeddings, labels = batch()
    tree = ClassTree.from_taxonomy(SPECIES, ANCESTORS) if is_given else ClassTree()
    tree.fit_embeddings(embeddings, labels)
    before = copy.deepcopy(tree.state_dict())
    loss = make(tree)
    expected = loss(embeddings, labels).item()
    loss.to(poor_device)
    for name, value in tree.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value.cpu(), before[name])
        assert value.device == (torch.device("cpu") if value.dtype == torch.float64 else poor_device)
    assert loss(embeddings.to(poor_device), labels.to(poor_device)).item() == pytest.approx(expected, abs=1e-6)
    assert loss(embeddings, labels).item() == expected  # the host still has the wide tables

    loaded = ClassTree().to(poor_device)
    if not is_given:
        loaded.load_state_dict(tree.state_dict())
        assert all(torch.equal(value.cpu(), before[name]) for name, value in loaded.state_dict().items())
    for change in ("half", "double", "float", "cpu"):
        getattr(tree, change)()
    for name, value in tree.state_dict().items():
        assert value.device.type == "cpu" and value.dtype == before[name].dtype and torch.equal(value, before[name])


def test_a_tree_is_fitted_where_it_stands(poor_device):
    expected, embeddings, labels = fitted()
    tree = ClassTree().to(poor_device)
    tree.fit(ClassStatistics(labels, 16).update(embeddings.to(poor_device), labels.to(poor_device)), device=poor_device)
    assert all(
        torch.equal(tree.part(name).cpu(), expected.part(name)) for name in NAMES if name in dict(tree.named_buffers())
    )
    assert tree.nodes.device == poor_device and tree.thresholds.device.type == "cpu"
    assert (tree.to_scipy_linkage() == expected.to_scipy_linkage()).all() and tree.d_0 == expected.d_0


def test_many_classes_are_searched_there(poor_device, monkeypatch):
    monkeypatch.setattr("pml_htl.tree.merging.MAX_MATRIX_CLASSES", 10)
    labels = torch.arange(60).repeat_interleave(3)
    embeddings = torch.randn(60, 8)[labels] + 0.1 * torch.randn(180, 8)
    statistics = ClassStatistics(labels, 8).update(embeddings, labels)
    here, there = ClassTree().fit(statistics), ClassTree().fit(statistics, device=poor_device)
    assert same_tree(here, there)


def test_statistics_for_the_device_are_kept_on_the_host(poor_device):
    embeddings, labels = batch()
    statistics, expected = (ClassStatistics(labels, 16, device=place) for place in (poor_device, None))
    for _ in range(2):
        statistics.update(embeddings.to(poor_device), labels.to(poor_device))
        expected.update(embeddings, labels)
    statistics.merge(copy.deepcopy(statistics)).add_classes([99])
    expected.merge(copy.deepcopy(expected)).add_classes([99])
    assert statistics.device == torch.device("cpu")
    other = ClassStatistics([*labels.tolist(), 99], 16, device=poor_device)
    other.load_state_dict(statistics.state_dict())
    for found in (statistics, other):
        for name in ("means", "counts", "spreads", "average_spread"):
            assert torch.equal(getattr(found, name).nan_to_num(), getattr(expected, name).nan_to_num())
        torch.testing.assert_close(found.squared_distances([0, 3]), expected.squared_distances([0, 3]), equal_nan=True)
    ClassTree().to(poor_device).fit(ClassStatistics(labels, 16, device=poor_device).update(embeddings, labels))


# Training


@pytest.mark.parametrize("streaming", [False, True])
def test_a_training_with_refreshes(poor_device, streaming):
    dataset = make_dataset()
    htl = make_htl(dataset.tensors[1], batches_per_epoch=10)
    refresh = htl.refresh_hook(None, mode="streaming") if streaming else htl.refresh_hook(dataset)
    model = torch.nn.Linear(INPUTS, 8, device=poor_device)
    htl.loss.to(poor_device)
    optimizer, values = torch.optim.SGD(model.parameters(), 0.5), []
    for _ in range(4):
        for inputs, labels in DataLoader(dataset, batch_sampler=htl.sampler):
            optimizer.zero_grad()
            loss = htl.loss(model(inputs.to(poor_device)), labels)  # labels on the host, as many loops leave them
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        refresh.refresh(model)
    assert htl.tree.is_fitted and htl.tree.nodes.device == poor_device
    assert 0 < values[-1] and all(value == value for value in values)


def test_the_watch_of_a_streaming_refresh(poor_device):
    _, embeddings, labels = fitted()
    loss = make(ClassTree())
    watch = LossWatch(loss, labels, forget=0.5)
    for _ in range(20):
        loss(embeddings.to(poor_device).requires_grad_(), labels.to(poor_device))
    assert watch.up_to_date().counts.sum() == 20 * len(labels)
    again = LossWatch(loss, labels, forget=0.5)
    again.load_state_dict(watch.state_dict())


def test_idle_batches_are_told(poor_device):
    labels = torch.arange(4).repeat_interleave(3)
    embeddings = torch.eye(4)[labels]
    loss = HierarchicalTripletLoss(DynamicMarginMiner(ClassTree(), initial_margin=0.1))
    for _ in range(100):
        loss(embeddings.to(poor_device), labels.to(poor_device))
    loss.miner.tree.fit_embeddings(embeddings + 0.1 * torch.randn(12, 4), labels)  # after a refresh it looks at the device
    loss.miner.beta = -4.0
    with pytest.warns(UserWarning, match="no triplet has given a loss in the last 101 batches"):
        loss(embeddings.to(poor_device), labels.to(poor_device))


def test_the_device_is_gone_after_a_test():
    assert not isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), DeviceMode)
    assert widest_float(DEVICE) == torch.float64
