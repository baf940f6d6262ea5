"""The loss in eval mode, on classes that the tree does not know: a validation loss on unseen classes."""

import copy
import warnings

import pytest
import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import LpDistance
from torch.utils.data import DataLoader

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.losses import CrossBatchMemory

from .test_losses import MARGIN, REDUCERS, TUPLES, assert_same, batch, ours, pmls, run
from .test_miners import TYPES
from .training import make_dataset, make_htl, make_models

pytestmark = pytest.mark.numerical

UNSEEN = 1000
KINDS = {"unseen": lambda labels: labels + UNSEEN, "some unseen": lambda labels: labels + UNSEEN * (labels % 2)}


def fitted(**kwargs):
    """A loss whose tree has six classes, in training mode, and a batch of them."""
    embeddings, labels = batch()
    return ours(ClassTree().fit_embeddings(embeddings, labels), **kwargs), embeddings, labels


@pytest.mark.parametrize("reducer", sorted(REDUCERS.keys() - {"class-weighted"}))  # which has weights for the classes 0 .. 5
@pytest.mark.parametrize("tuples", TUPLES)
@pytest.mark.parametrize("power", [1, 2])
def test_on_unseen_classes_it_is_pmls_loss_with_the_initial_margin(reducer, tuples, power):
    embeddings, labels = batch()
    tree = ClassTree().fit_embeddings(embeddings, labels)
    unseen, labels = embeddings.flip(1), labels + UNSEEN
    mined = TUPLES[tuples](unseen, labels)
    one, other = (make(reducer=REDUCERS[reducer](), power=power) for make in (lambda **kw: ours(tree, **kw), pmls))
    results = [run(loss.eval(), unseen, labels, indices_tuple=mined) for loss in (one, other)]
    assert_same(*(result if isinstance(result, type) else result[:-1] for result in results))  # all but the records


@pytest.mark.parametrize("options", [{}, {"temperature": 0.1}, {"smooth_loss": True}, {"swap": True}], ids=str)
def test_no_refresh_moves_the_loss_on_unseen_classes(options):
    embeddings, labels = batch()
    loss = ours(**options).eval()
    expected = loss(embeddings, labels + UNSEEN)
    loss.miner.tree.fit_embeddings(embeddings, labels)
    assert loss(embeddings, labels + UNSEEN) == expected > 0
    loss.miner.tree.fit_embeddings(embeddings.flip(1), labels)
    assert loss(embeddings, labels + UNSEEN) == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 0.1}, {"smooth_loss": True}, {"swap": True}], ids=str)
def test_on_known_classes_it_is_the_same_in_both_modes(options):
    loss, embeddings, labels = fitted(**options)
    assert loss(embeddings, labels) == loss.eval()(embeddings, labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [1, 2])
def test_the_margins_of_pairs_with_one_or_two_unseen_classes(kind, power):
    embeddings, labels = batch()
    tree = ClassTree().fit_embeddings(embeddings, labels)
    miner = DynamicMarginMiner(tree, initial_margin=MARGIN, distance=LpDistance(power=power))
    known = miner.margins(labels.unsqueeze(1), labels)
    given = KINDS[kind](labels)
    is_known = given == labels
    expected = known.where(is_known.unsqueeze(1) & is_known, MARGIN)
    miner.eval()
    assert torch.equal(miner.margins(given.unsqueeze(1), given), expected)
    assert torch.equal(miner.margins(given.tolist(), labels[0]), known[:, 0].where(is_known, MARGIN))
    assert torch.equal(miner.margins(labels.unsqueeze(1), labels), known)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(miner.margin_matrix(given, given, dtype, training=False), expected.to(dtype))
        assert torch.equal(
            miner.margin_matrix(given, labels.flip(0), dtype, training=False),
            known.flip(1).where(is_known.unsqueeze(1), MARGIN).to(dtype),
        )
    with pytest.raises(ValueError, match="do not broadcast"):
        miner.margins(labels[:3], labels[:4])


@pytest.mark.parametrize("type_of_triplets", TYPES)
def test_the_miner_in_eval_mode_mines_by_the_initial_margin(type_of_triplets):
    embeddings, labels = batch()
    tree = ClassTree().fit_embeddings(embeddings, labels)
    arguments = {"initial_margin": MARGIN, "type_of_triplets": type_of_triplets}
    found = DynamicMarginMiner(tree, **arguments).eval()(embeddings, labels + UNSEEN)
    assert all(map(torch.equal, found, DynamicMarginMiner(ClassTree(), **arguments)(embeddings, labels)))


def test_the_sum_over_a_batch_with_some_unseen_classes():
    """Triplet by triplet, each with the margin of its own pair."""
    loss, embeddings, labels = fitted()
    given = KINDS["some unseen"](labels)
    loss.eval()
    squared = torch.cdist(torch.nn.functional.normalize(embeddings), torch.nn.functional.normalize(embeddings)).square()
    found = [
        max(0.0, (squared[a, p] - squared[a, n] + loss.miner.margins(given[a], given[n])).item())
        for a in range(len(labels))
        for p in range(len(labels))
        for n in range(len(labels))
        if p != a and labels[a] == labels[p] != labels[n]
    ]
    active = [value for value in found if value > 0]
    assert loss(embeddings, given).item() == pytest.approx(sum(active) / len(active), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_an_unseen_class_is_an_error(kind):
    loss, embeddings, labels = fitted()
    given = KINDS[kind](labels)
    refused = pytest.raises(ValueError, match=r"not among the 6 classes of the class tree .* put the loss into eval mode")
    for mode in (loss.miner.train, loss.miner.eval):  # the loss's own mode counts, and the miner's for the miner
        mode()
        for options in ({}, {"temperature": 0.1}, {"swap": True}):
            with refused:
                HierarchicalTripletLoss(loss.miner, **options)(embeddings, given)
        with refused:  # one sample of each class: there are no triplets
            HierarchicalTripletLoss(loss.miner, swap=True)(embeddings[:3], torch.tensor([1000, 1001, 1002]))
    loss.eval()
    loss.train()
    for call in (
        lambda: loss.miner(embeddings, given),
        lambda: loss.miner.margins(given, labels),
        lambda: loss.miner.margins(labels, given),
        lambda: loss(embeddings, labels, ref_emb=embeddings, ref_labels=given),
    ):
        with refused:
            call()


def test_wrappers_hand_their_mode_on():
    loss, embeddings, labels = fitted()
    expected = ours()(embeddings, labels)
    for wrapper in (losses.MultipleLosses([loss]), CrossBatchMemory(loss, 16), torch.nn.ModuleList([loss])):
        wrapper.eval()
        assert not loss.training and not loss.miner.training
        assert loss(embeddings, labels + UNSEEN) == expected
        wrapper.train()
        assert loss.training and loss.miner.training
    assert losses.MultipleLosses([loss]).eval()(embeddings, labels + UNSEEN) == expected


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("with_ref", [False, True])
def test_a_validation_step_does_not_wait_for_the_device(where, with_ref):
    """On the meta device there are no values: whoever asks for one, or for a shape that depends on one, gets an error."""
    loss, embeddings, labels = fitted()
    labels = (labels + UNSEEN).to("meta" if where == "device" else "cpu")
    ref = {"ref_emb": embeddings.to("meta"), "ref_labels": labels.clone()} if with_ref else {}
    value = loss.eval()(embeddings.to("meta"), labels, **ref)
    assert value.device.type == "meta"


def test_idle_validation_batches_are_not_counted():
    labels = torch.arange(4).repeat_interleave(3)
    far = torch.eye(4)[labels]
    loss = HierarchicalTripletLoss(DynamicMarginMiner(ClassTree(), initial_margin=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            loss(far, labels)
        loss.eval()
        for _ in range(150):
            loss(far, labels)
    loss(far, labels.roll(1))  # one with some, which does not count either
    with pytest.warns(UserWarning, match="no triplet has given a loss in the last 100 batches"):
        loss.train()(far, labels)


# In a training


def train(streaming, validate):
    """Three epochs of a plain loop, with the validation loss after each, if it is wanted."""
    dataset = make_dataset()
    inputs, labels = dataset.tensors
    htl = make_htl(labels, batches_per_epoch=6)
    refresh = htl.refresh_hook(None, mode="streaming") if streaming else htl.refresh_hook(dataset)
    model = torch.nn.Sequential(*make_models().values())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    twin, found = losses.TripletMarginLoss(htl.miner.initial_margin, distance=LpDistance(power=2)), []
    for _ in range(3):
        for x, y in DataLoader(dataset, batch_sampler=htl.sampler):
            optimizer.zero_grad()
            htl.loss(model(x), y).backward()
            optimizer.step()
        if validate:
            model.eval()
            htl.loss.eval()
            with torch.inference_mode():
                embeddings = model(inputs + 0.1)
                found.append((htl.loss(embeddings, labels + UNSEEN).item(), twin(embeddings, labels).item()))
            model.train()
            htl.loss.train()
        refresh.refresh(model)
    return model, htl, found


@pytest.mark.parametrize("streaming", [False, True])
def test_a_plain_loop_with_a_validation_loss_trains_as_one_without(streaming):
    model, htl, found = train(streaming, validate=True)
    assert [one for one, _ in found] == pytest.approx([other for _, other in found], rel=1e-5)
    other, plain, _ = train(streaming, validate=False)
    for name, value in htl.tree.state_dict().items():
        assert torch.equal(value, plain.tree.state_dict()[name])
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)


def test_for_a_memory_the_loss_in_it_is_called():
    loss, embeddings, labels = fitted()
    memory = CrossBatchMemory(loss, 16, 60)
    memory(embeddings, labels)
    before = copy.deepcopy(memory.state_dict())
    memory.eval()
    assert memory.loss(embeddings, labels + UNSEEN) == ours()(embeddings, labels)
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(before[name])) for name, value in memory.state_dict().items()
    )
    memory.train()(embeddings, labels)
