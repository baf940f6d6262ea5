"""The transforms of torch.func over the loss, against autograd in loops; and what a call under them leaves behind."""

import copy
import pickle

import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.distances import LpDistance
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from pml_htl import HTL, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.arithmetic import hinge
from pml_htl.arithmetic.distances import distance_matrix

pytestmark = pytest.mark.numerical

REDUCERS = {
    "avg-non-zero": reducers.AvgNonZeroReducer,
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "threshold": lambda: reducers.ThresholdReducer(low=0.1, high=0.9),
    "class-weighted": lambda: reducers.ClassWeightedReducer(torch.linspace(0.5, 2, 5, dtype=torch.float64)),
}
WITH_A_THRESHOLD = ("avg-non-zero", "threshold")  # in a list they look for the losses that count, which vmap cannot follow
OPTIONS = [{}, {"collect_stats": True}, {"smooth_loss": True}, {"swap": True}, {"temperature": 0.05}]


def data():
    """Inputs (30, 8) with labels of 5 classes, and linear heads (4, 8, 6) side by side."""
    generator = torch.Generator().manual_seed(0)
    inputs, heads = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((30, 8), (4, 8, 6)))
    return inputs, torch.arange(5).repeat_interleave(6), heads


def ours(fitted=False, power=2, **kwargs):
    inputs, labels, heads = data()
    tree = ClassTree().fit_embeddings(inputs @ heads[0], labels) if fitted else ClassTree()
    return HierarchicalTripletLoss(DynamicMarginMiner(tree, initial_margin=0.3, distance=LpDistance(power=power)), **kwargs)


def pmls(power=2, **kwargs):
    return losses.TripletMarginLoss(0.3, distance=LpDistance(power=power), **kwargs)


def of_head(loss, labels=None, **kwargs):
    """The loss as a function of a head (8, 6)."""
    inputs, known, _ = data()
    return lambda head: loss(inputs @ head, known if labels is None else labels, **kwargs)


def references():
    generator = torch.Generator().manual_seed(1)
    return {"ref_emb": torch.randn(20, 6, generator=generator, dtype=torch.float64), "ref_labels": torch.arange(20) % 5}


def by_autograd(f, heads):
    """The values (4,), and the gradients (4, 8, 6)."""
    leaf = heads.clone().requires_grad_()
    values = torch.stack([f(head) for head in leaf])
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("way", [hinge.MAX_COMPARISONS, -1], ids=["comparing", "searching"])
def test_the_transforms_of_the_loss_are_autograds(power, options, fitted, way, monkeypatch):
    monkeypatch.setattr(hinge, "MAX_COMPARISONS", way)
    _, _, heads = data()
    for name, make in REDUCERS.items():
        for ref in ({}, references()):
            if ref and "swap" in options:
                continue
            loss = ours(fitted, power, reducer=make(), **options)
            f = of_head(loss, **ref)
            values, gradients = by_autograd(f, heads)
            same(grad(f)(heads[0]), gradients[0])
            same(jacrev(f)(heads[0]), gradients[0])
            same(jacfwd(f)(heads[0]), gradients[0])
            value, tangent = jvp(f, (heads[0],), (heads[1],))
            same(value, values[0])
            same(tangent, (gradients[0] * heads[1]).sum())
            if loss._needs_list(None) and name in WITH_A_THRESHOLD:
                continue
            same(vmap(f)(heads), values)
            same(vmap(grad(f))(heads), gradients)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_derivatives_are_autograds(power, options):
    _, _, heads = data()
    f = of_head(ours(True, power, **options))
    expected = torch.autograd.functional.hessian(f, heads[0])
    assert expected.abs().max() > 1e-3
    same(hessian(f)(heads[0]), expected)
    same(jacrev(jacrev(f))(heads[0]), expected)
    step = grad(lambda head: f(head - 0.1 * grad(f)(head)))(heads[0])  # as MAML has it
    leaf = heads[0].clone().requires_grad_()
    (inner,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    same(step, torch.autograd.grad(f(leaf - 0.1 * inner), leaf)[0])


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("with_ref", [False, True])
def test_distances(power, with_ref):
    inputs, _, heads = data()
    ref_emb = references()["ref_emb"] if with_ref else None

    def f(head):
        embeddings = inputs @ head
        embeddings = torch.cat([embeddings, 2 * embeddings[:1]])  # a distance of zero
        distances = distance_matrix(LpDistance(power=power), embeddings, embeddings if ref_emb is None else ref_emb)
        return distances.square().sum() + distances.sum()

    values, gradients = by_autograd(f, heads)
    same(vmap(f)(heads), values)
    same(vmap(grad(f))(heads), gradients)
    same(vmap(jacfwd(f))(heads), gradients)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("fitted", [False, True])
def test_each_task_of_vmap_may_have_labels_of_its_own(fitted):
    inputs, labels, heads = data()
    loss = ours(fitted)
    tasks = torch.stack([labels.roll(shift) for shift in (0, 2, 3, 7)])

    def f(head, labels):
        return loss(inputs @ head, labels)

    expected = [
        by_autograd(of_head(loss, labels), head.unsqueeze(0))[1][0] for head, labels in zip(heads, tasks, strict=True)
    ]
    same(vmap(grad(f))(heads, tasks), torch.stack(expected))
    if fitted:
        with pytest.raises(ValueError, match="labels 5, 6 not among the 5 classes of the class tree"):
            vmap(f)(heads, tasks + 2 * (torch.arange(4) == 3).unsqueeze(1))


@pytest.mark.parametrize("power", [1, 2])
def test_nan_shows_where_it_shows_without_transforms(power):
    inputs, labels, heads = data()
    inputs[29] = torch.nan
    pairs = tuple(map(torch.tensor, ([0, 1], [1, 2], [0, 1], [6, 7])))  # none of them has it
    loss = ours(power=power)
    for indices_tuple, shows in ((None, True), (pairs, False)):
        values = torch.stack([loss(inputs @ head, labels, indices_tuple) for head in heads])
        assert values.isnan().all() == shows
        torch.testing.assert_close(
            vmap(lambda head, pairs=indices_tuple: loss(inputs @ head, labels, pairs))(heads), values, equal_nan=True
        )


def test_what_pmls_triplet_loss_can_do_this_can():
    _, _, heads = data()
    transforms = {
        "grad": lambda f: grad(f)(heads[0]),
        "vmap": lambda f: vmap(f)(heads),
        "vmap of grad": lambda f: vmap(grad(f))(heads),
        "jacrev": lambda f: jacrev(f)(heads[0]),
        "jacrev twice": lambda f: jacrev(jacrev(f))(heads[0]),
        "jvp": lambda f: jvp(f, (heads[0],), (heads[1],))[1],
        "jacfwd": lambda f: jacfwd(f)(heads[0]),
        "hessian": lambda f: hessian(f)(heads[0]),
    }
    not_pmls = {"mean": {"jvp", "jacfwd", "hessian"}, "avg-non-zero": {"jvp", "jacfwd", "hessian", "vmap", "vmap of grad"}}
    for reducer, expected in not_pmls.items():
        one, other = (of_head(make(reducer=REDUCERS[reducer]())) for make in (ours, pmls))
        failed = set()
        for name, transform in transforms.items():
            found = transform(one)
            try:
                same(found, transform(other))
            except (NotImplementedError, RuntimeError):
                failed.add(name)
        assert failed <= expected  # a later torch may do more


def test_with_other_losses_and_miners():
    inputs, labels, heads = data()
    others = losses.NTXentLoss(reducer=reducers.MeanReducer())
    f = of_head(losses.MultipleLosses([ours(True), others]))
    values, gradients = by_autograd(f, heads)
    same(vmap(f)(heads), values)
    same(vmap(grad(f))(heads), gradients)
    for miner in (miners.TripletMarginMiner(0.2), miners.MultiSimilarityMiner(), ours(True).miner):
        loss = ours(True)
        loss.miner.type_of_triplets = "semihard"

        def mined(head, loss=loss, miner=miner):
            return loss(inputs @ head, labels, miner(inputs @ head, labels))

        same(grad(mined)(heads[0]), by_autograd(mined, heads)[1][0])


def test_over_the_parameters_of_a_model():
    inputs, labels, _ = data()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.loss = torch.nn.Linear(8, 6, dtype=torch.float64), ours(True)

        def forward(self, inputs):
            return self.loss(self.head(inputs), labels)

    model = Model()
    parameters = dict(model.named_parameters())
    found = grad(lambda parameters: functional_call(model, parameters, (inputs,)))(parameters)
    model(inputs).backward()
    for name, parameter in parameters.items():
        same(found[name], parameter.grad)


def test_what_is_left_behind_can_be_copied_and_saved():
    inputs, labels, heads = data()
    weights = torch.ones(5)  # are moved to float64
    loss = ours(True, reducer=reducers.ClassWeightedReducer(weights), collect_stats=True)
    f = of_head(loss)
    grad(f)(heads[0])
    recorded = loss.margin, loss.min_margin, loss.max_margin, loss.active_share
    pickle.dumps(loss)
    restored = copy.deepcopy(loss)
    f(heads[0])
    assert recorded == (loss.margin, loss.min_margin, loss.max_margin, loss.active_share) and loss.active_share > 0
    assert restored(inputs @ heads[0], labels) == f(heads[0])
    vmap(grad(f))(heads)  # one margin for all copies, as they have the same labels, and a share of active ones for each
    assert loss.margin == recorded[0]
    pickle.dumps(loss)
    loss(inputs[:, :6], labels.to(torch.uint64))
    grad(lambda embeddings: loss(embeddings, labels.to(torch.uint64)))(inputs[:, :6])


def test_idle_batches_are_counted():
    _, _, heads = data()
    loss = HierarchicalTripletLoss(DynamicMarginMiner(ClassTree(), initial_margin=-4.0))
    f = of_head(loss)
    vmap(f)(heads)
    for _ in range(99):
        grad(f)(heads[0])
    with pytest.warns(UserWarning, match="no triplet has given a loss in the last 100 batches"):
        f(heads[0])


def test_streaming_follows_a_loss_under_grad_and_refuses_vmap():
    _, labels, heads = data()
    spreads = []
    for transform in (grad, lambda f: lambda head: f(head.clone().requires_grad_())):
        htl = HTL(labels, num_anchors=2, neighborhood_size=2, samples_per_class=2)
        refresh = htl.refresh_hook(None, mode="streaming")
        for step in range(20):  # some are still in its buffer
            transform(of_head(htl.loss))(heads[step % 4])
        refresh.refresh()
        spreads.append(htl.tree.spreads)
    assert torch.equal(*spreads)
    with pytest.raises(ValueError, match=r"cannot follow a loss under torch\.func\.vmap"):
        vmap(grad(of_head(htl.loss)))(heads)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_the_device_is_not_waited_for(fitted, power):
    """On the meta device there are no values: whoever asks for one gets an error."""
    inputs, labels, heads = (part.to("meta") for part in data())
    for reducer in (reducers.AvgNonZeroReducer(), reducers.ClassWeightedReducer(torch.ones(5))):
        loss = ours(fitted, power, reducer=reducer)
        assert vmap(grad(lambda head, loss=loss: loss(inputs @ head, labels)))(heads).shape == heads.shape
        tasks = labels.expand(len(heads), -1)
        assert vmap(lambda head, labels, loss=loss: loss(inputs @ head, labels))(heads, tasks).shape == heads.shape[:1]


@pytest.mark.slow
def test_compiled():
    _, _, heads = data()
    f = of_head(ours(True))
    expected = vmap(grad(f))(heads)
    same(torch.compile(vmap(grad(f)), backend="aot_eager")(heads), expected)  # inductor needs a C++ compiler
    same(vmap(grad(torch.compile(f, backend="aot_eager")))(heads), expected)
