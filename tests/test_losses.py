import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning import reducers
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchEasyHardMiner, MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.regularizers import LpRegularizer

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.losses import CrossBatchMemory

from . import oracle
from .examples import are_apart, labelled_embeddings, make_embeddings

pytestmark = pytest.mark.numerical

MARGIN = 0.3


def ours(tree=None, power=2, **kwargs):
    tree = ClassTree() if tree is None else tree
    return HierarchicalTripletLoss(
        DynamicMarginMiner(tree, initial_margin=MARGIN, distance=LpDistance(power=power)), **kwargs
    )


def pmls(power=2, **kwargs):
    return TripletMarginLoss(MARGIN, distance=LpDistance(power=power), **kwargs)


def batch(seed=0, num_classes=6, per_class=4, dtype=torch.float32, dimensions=16):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return torch.randn(len(labels), dimensions, generator=generator, dtype=dtype), labels


def run(loss, embeddings, labels, **kwargs):
    """Value or what was raised, gradient, and everything recorded on loss, distance and reducers."""
    embeddings = embeddings.clone().requires_grad_()
    try:
        value = loss(embeddings, labels, **kwargs)
    except Exception as error:
        return type(error)
    if isinstance(value, dict) and torch.is_tensor(value["loss"]["losses"]):  # DoNothingReducer
        (value["loss"]["losses"] ** 2).sum().backward()
        details = [value["loss"]["losses"].detach(), *value["loss"]["indices"], value["loss"]["reduction_type"]]
    elif isinstance(value, dict):  # without any triplet
        details = [value["loss"]["losses"], value["loss"]["indices"], value["loss"]["reduction_type"]]
    else:
        value.backward()
        details = [value.detach()]
    return [*details, embeddings.grad, recorded(loss)]


OUR_STATS = {".min_margin", ".max_margin", ".active_share"}


def recorded(loss):
    """Everything recorded on loss, distance and reducers, but for what PML's loss has no name for."""
    modules = [("", loss), *loss.distance.named_modules(prefix="distance"), *loss.reducer.named_modules(prefix="reducer")]
    lists = ("_record_these", "_record_these_stats")
    names = [(path, module, name) for path, module in modules for some in lists for name in getattr(module, some, [])]
    found = {f"{path}.{name}": getattr(module, name) for path, module, name in names}
    return {name: value for name, value in found.items() if name not in OUR_STATS}


def assert_same(one, other):
    """Up to rounding: sums are taken in another order than PML's."""
    if isinstance(one, type):
        assert one is other
        return
    for a, b in zip(one, other, strict=True):
        if isinstance(a, torch.Tensor):
            tolerance = 1e-5 if a.dtype == torch.float32 else 1e-10
            largest = max(1, float(b.detach().abs().max())) if b.numel() else 1  # gradients are sums of many, up to this
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            assert all(a[name] == (b[name] and pytest.approx(b[name], rel=1e-6)) for name in b)
        else:
            assert a == b


REDUCERS = {
    "default": lambda: None,
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "avg-non-zero": reducers.AvgNonZeroReducer,
    "threshold": lambda: reducers.ThresholdReducer(low=0.05, high=0.9),
    "class-weighted": lambda: reducers.ClassWeightedReducer(torch.linspace(0.1, 2, 6)),
    "do-nothing": reducers.DoNothingReducer,
    "multiple": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}),
    "per-anchor": reducers.PerAnchorReducer,  # PML raises
    "divisor": reducers.DivisorReducer,  # PML raises
}
TUPLES = {
    "all": lambda embeddings, labels: None,
    "triplets": lambda embeddings, labels: TripletMarginMiner(0.1, "semihard")(embeddings, labels),
    "pairs": lambda embeddings, labels: MultiSimilarityMiner()(embeddings, labels),
    "hardest": lambda embeddings, labels: BatchEasyHardMiner()(embeddings, labels),
    "none": lambda embeddings, labels: (torch.empty(0, dtype=torch.int64),) * 3,
}


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("tuples", TUPLES)
@pytest.mark.parametrize("options", [{}, {"swap": True}, {"smooth_loss": True}], ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_not_fitted_it_is_pmls_triplet_loss(reducer, tuples, options, power):
    for dtype in (torch.float32, torch.float64):
        embeddings, labels = batch(dtype=dtype)
        kwargs = {**options, "reducer": REDUCERS[reducer](), "collect_stats": True}
        indices_tuple = TUPLES[tuples](embeddings, labels)
        both = [make(power=power, **kwargs) for make in (ours, pmls)]
        for loss in both:
            for module in (loss.distance, loss.reducer):
                module.collect_stats = True
        assert_same(*(run(loss, embeddings, labels, indices_tuple=indices_tuple) for loss in both))


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("tuples", ["all", "triplets", "pairs"])
def test_with_reference_embeddings_and_regularizer(reducer, tuples):
    embeddings, labels = batch()
    ref_emb, ref_labels = batch(seed=1, per_class=3)
    indices_tuple = {
        "all": None,
        "triplets": TripletMarginMiner(0.1)(embeddings, labels, ref_emb, ref_labels),
        "pairs": MultiSimilarityMiner()(embeddings, labels, ref_emb, ref_labels),
    }[tuples]
    inputs = {"indices_tuple": indices_tuple, "ref_emb": ref_emb, "ref_labels": ref_labels}
    results = []
    for make in (ours, pmls):
        loss = make(reducer=REDUCERS[reducer](), embedding_regularizer=LpRegularizer(), embedding_reg_weight=0.7)
        results.append(run(loss, embeddings, labels, **inputs))
    assert_same(*results)


def test_random_triplets_per_anchor_are_pmls():
    embeddings, labels = batch()
    results = []
    for make in (ours, pmls):
        torch.manual_seed(0)
        results.append(run(make(triplets_per_anchor=3), embeddings, labels))
    assert_same(*results)


def constant_tree(embeddings, labels, constant):
    """A fitted tree in which every pair of classes has the same margin."""
    tree = ClassTree().fit_embeddings(embeddings, labels)
    state = tree.state_dict()
    state["nodes"].zero_()  # all classes meet at level 0, whose threshold is above their distance
    state["merge_heights"].zero_()
    state["thresholds"] += constant
    state["spreads"].fill_(state["thresholds"][0].item() + 0.1 - constant)  # and alpha = 0.1 + d_0 - s
    tree.load_state_dict(state)
    return tree


@given(labelled_embeddings(), st.sampled_from(["default", "mean", "sum"]))
@pytest.mark.filterwarnings("ignore:the embeddings have collapsed")
def test_with_a_constant_margin_it_is_pmls_triplet_loss(example, reducer):
    embeddings, labels = (torch.from_numpy(array) for array in example)
    tree = constant_tree(embeddings, labels, MARGIN)
    one = run(ours(tree, reducer=REDUCERS[reducer]()), embeddings, labels)
    other = run(pmls(reducer=REDUCERS[reducer]()), embeddings, labels)
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-9)
    if reducer == "sum":  # an average over the non-zero losses jumps where rounding decides what is zero
        losses = pmls(reducer=reducers.DoNothingReducer())(embeddings, labels)["loss"]["losses"]
        if torch.is_tensor(losses) and ((losses == 0) | (losses > 1e-9)).all():
            torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-6)


@given(
    labelled_embeddings(kinds=["random", "clustered"], max_classes=6),
    st.sampled_from([1, 2]),
    st.sampled_from([{}, {"swap": True}, {"smooth_loss": True}]),
    st.sampled_from(["default", "mean", "sum"]),
)
def test_fitted_it_is_the_loss_of_the_equations(example, power, options, reducer):
    embeddings, labels = example
    tree = ClassTree(4).fit_embeddings(torch.from_numpy(embeddings), labels)
    margin_of = margins_from_the_equations(embeddings, labels, 4, power)
    rng = np.random.default_rng(len(labels))  # a later batch: other embeddings, not of norm one
    moved = torch.from_numpy((embeddings + 0.3 * rng.normal(size=embeddings.shape)) * rng.uniform(0.5, 2, (len(labels), 1)))

    assume(power == 2 or are_apart(moved))
    leaf = moved.clone().requires_grad_()
    found = oracle.triplets(labels)
    losses = oracle.losses(
        leaf, found, lambda a, n: margin_of(labels[a], labels[n]), power, options.get("smooth_loss"), options.get("swap")
    )
    expected = {
        "default": losses[losses > 0].mean() if (losses > 0).any() else losses.sum(),
        "mean": losses.mean(),
        "sum": losses.sum(),
    }[reducer]
    expected.backward()
    value, gradient, _ = run(ours(tree, power, reducer=REDUCERS[reducer](), **options), moved, torch.from_numpy(labels))
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-8)


def margins_from_the_equations(embeddings, labels, num_levels, power):
    spreads, average = oracle.spreads(embeddings, labels)
    levels = oracle.thresholds(average, num_levels)
    nodes = oracle.single_linkage_nodes(oracle.class_distances(embeddings, labels), levels)
    place = {label: position for position, label in enumerate(np.unique(labels))}
    return lambda a, n: oracle.margin(nodes, levels, spreads, place[a], place[n], power=power)


def test_fitted_with_reference_embeddings():
    embeddings, labels = make_embeddings("clustered", [3, 1, 4, 2], 4, seed=1)
    ref_emb, ref_labels = embeddings[::-1][:7].copy(), labels[::-1][:7].copy()
    tree = ClassTree(4).fit_embeddings(torch.from_numpy(embeddings), labels)
    margin_of = margins_from_the_equations(embeddings, labels, 4, 2)
    tensors = [torch.from_numpy(array) for array in (embeddings, labels, ref_emb, ref_labels)]
    found = oracle.triplets(labels, ref_labels)
    expected = oracle.losses(tensors[0], found, lambda a, n: margin_of(labels[a], ref_labels[n]), ref_emb=tensors[2])
    value = ours(tree, reducer=reducers.MeanReducer())(*tensors[:2], ref_emb=tensors[2], ref_labels=tensors[3])
    assert value.item() == pytest.approx(expected.mean().item(), abs=1e-12)


def test_a_batch_without_triplets_gives_a_zero_loss_that_backpropagates():
    embeddings, _ = batch()
    for labels in (torch.zeros(len(embeddings), dtype=torch.int64), torch.arange(len(embeddings))):
        leaf = embeddings.clone().requires_grad_()
        value = ours()(leaf, labels)
        value.backward()
        assert value == 0 and (leaf.grad == 0).all()


def test_refusals():
    embeddings, labels = batch()
    tree = ClassTree().fit_embeddings(embeddings, labels)
    with pytest.raises(ValueError, match="labels are required"):
        ours()(embeddings, indices_tuple=TUPLES["triplets"](embeddings, labels))
    with pytest.raises(ValueError, match="ref_labels are required"):
        triplets = TUPLES["triplets"](embeddings, labels)
        ours()(embeddings, labels, triplets, ref_emb=embeddings.clone())
    with pytest.raises(ValueError, match="swap=True does not work with ref_emb"):
        ours(swap=True)(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels.clone())
    with pytest.raises(ValueError, match=r"labels 6, 7, 8.*class tree"):
        ours(tree)(embeddings, labels + 3)
    with pytest.raises(ValueError, match="one label per embedding"):
        ours()(embeddings, labels[1:])
    with pytest.raises(ValueError, match="miner's margins are for power 2"):
        HierarchicalTripletLoss(DynamicMarginMiner(tree), distance=LpDistance(power=1))
    with pytest.raises(ValueError, match="CosineSimilarity"):
        HierarchicalTripletLoss(DynamicMarginMiner(tree), distance=CosineSimilarity())
    with pytest.raises(TypeError, match="DynamicMarginMiner"):
        HierarchicalTripletLoss(TripletMarginMiner())


def test_the_order_of_triplets_is_pmls():
    from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_triplets_indices

    from pml_htl.arithmetic.triplets import all_triplets

    for num_classes, per_class in itertools.product([1, 3, 5], [1, 2, 4]):
        _, labels = batch(num_classes=num_classes, per_class=per_class)
        for refs in (labels, labels.clone()):
            theirs = get_all_triplets_indices(labels, refs)
            assert all(map(torch.equal, all_triplets(labels, refs), theirs))


@pytest.mark.parametrize(
    "reducer", [None, reducers.MeanReducer(), reducers.SumReducer(), reducers.ThresholdReducer(high=1.0)]
)
@pytest.mark.parametrize("where", ["embeddings", "ref_emb"])
@pytest.mark.parametrize("num_classes", [6, 1])  # one class of a hundred: too many positives to compare each
def test_a_nan_anywhere_makes_the_loss_nan(reducer, where, num_classes):
    labels = torch.arange(100) % num_classes
    labels[0] = num_classes
    parts = {"embeddings": torch.randn(100, 8), "ref_emb": torch.randn(100, 8)}
    parts[where][3] = torch.nan
    loss = HierarchicalTripletLoss(DynamicMarginMiner(ClassTree()), reducer=reducer)
    assert loss(labels=labels, ref_labels=labels.clone(), **parts).isnan()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("know", ["many positives", "nobody knows how many"])  # the second is what a GPU does in each batch
def test_training_steps_where_positives_are_searched(know, dtype, power, monkeypatch):
    embeddings, labels = batch(num_classes=4, per_class=80, dtype=dtype)
    if know == "nobody knows how many":
        embeddings, labels = batch(dtype=dtype)
        monkeypatch.setattr("pml_htl.arithmetic.triplets._most", lambda numbers: None)
    values = []
    for loss in (ours(power=power), pmls(power=power)):
        leaves = embeddings.clone().requires_grad_()
        value = loss(leaves, labels)
        value.backward()
        values.append((value.detach(), leaves.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    if dtype == torch.float32 and know == "many positives":
        tolerance = 1e-3  # of six million triplets rounding decides whether some count; one is 1e-4 of the largest gradient
    for mine, theirs in zip(*values, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=100 * tolerance, atol=tolerance * float(theirs.abs().max()))


def test_a_memory_with_more_and_more_samples_of_a_class_trains_on():
    memory = CrossBatchMemory(ours(), 8, memory_size=400)
    for seed in range(16):
        embeddings, labels = batch(seed, num_classes=4, per_class=8, dimensions=8)
        embeddings.requires_grad_()
        memory(embeddings, labels).backward()
        assert embeddings.grad.isfinite().all() and embeddings.grad.any()
