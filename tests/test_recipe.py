import doctest
import importlib
import inspect
import math
import pkgutil
import subprocess
import sys

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch.utils.data import DataLoader, TensorDataset

import pml_htl
from pml_htl import HTL, AnchorNeighborSampler, ClassTree

EXPORTS = {
    "ClassStatistics", "ClassTree", "AnchorNeighborSampler", "DynamicMarginMiner", "HierarchicalTripletLoss",
    "TreeRefresh", "HTL", "__version__",
}  # fmt: skip
MODULES = sorted(module.name for module in pkgutil.walk_packages(pml_htl.__path__, "pml_htl.") if not module.ispkg)
WITH_EXAMPLES = ("pml_htl.losses", "pml_htl.recipe", "pml_htl.checkpoint", "pml_htl.lightning")


def test_exports():
    assert set(pml_htl.__all__) == EXPORTS
    public = {name for name, value in vars(pml_htl).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == EXPORTS - {"__version__"}
    assert set(WITH_EXAMPLES) <= set(MODULES)


def test_the_parts_share_one_tree():
    labels = torch.arange(30).repeat_interleave(4)
    htl = HTL(
        labels, num_anchors=2, neighborhood_size=3, samples_per_class=4, num_levels=8, beta=0.2, initial_margin=0.3,
        linkage="complete", distance=LpDistance(power=1), batches_per_epoch=5, seed=1, reducer=MeanReducer(), swap=True,
    )  # fmt: skip
    assert htl.sampler.tree is htl.miner.tree is htl.tree and htl.loss.miner is htl.miner
    assert htl.loss.distance is htl.miner.distance and htl.loss.distance.power == 1
    assert (htl.tree.num_levels, htl.tree.linkage, htl.miner.beta, htl.miner.initial_margin) == (8, "complete", 0.2, 0.3)
    assert htl.batch_size == 24 and len(htl.sampler) == 5
    assert isinstance(htl.loss, BaseMetricLossFunction) and isinstance(htl.miner, BaseMiner)
    assert type(htl.loss.reducer) is MeanReducer and htl.loss.swap
    hook = htl.refresh_hook(TensorDataset(torch.ones(1), torch.ones(1)), then=print, warmup_epochs=3)
    assert hook.tree is htl.tree and hook.then is print and hook.warmup_epochs == 3


def test_forms():
    recommended, paper = (HTL(range(200), **{"samples_per_class": 2, **form}) for form in ({}, {"form": "paper"}))
    assert (recommended.miner.distance.power, recommended.loss.temperature) == (1, 0.05)
    assert (paper.miner.distance.power, paper.loss.temperature) == (2, None)
    other = HTL(range(200), samples_per_class=2, temperature=None, distance=LpDistance(power=2))
    assert (other.miner.distance.power, other.loss.temperature) == (2, None)
    assert HTL(range(200), samples_per_class=2, smooth_loss=True).loss.temperature is None  # two ways to smooth one maximum
    with pytest.raises(ValueError, match="form must be one of recommended, paper, but it is 'papers'"):
        HTL(range(200), form="papers")


@pytest.mark.parametrize(
    "given, counts",
    [
        ({}, (8, 4, 4)),
        ({"batch_size": 64}, (4, 4, 4)),
        ({"num_anchors": 2}, (2, 4, 4)),
        ({"num_anchors": 2, "neighborhood_size": 3, "samples_per_class": 5}, (2, 3, 5)),
        ({"batch_size": 48, "num_anchors": 2}, (2, 6, 4)),
        ({"batch_size": 48, "num_anchors": 2, "neighborhood_size": 3}, (2, 3, 8)),
        ({"batch_size": 24, "num_anchors": 2, "neighborhood_size": 3, "samples_per_class": 4}, (2, 3, 4)),
        ({"batch_size": 32, "neighborhood_size": 8, "samples_per_class": 2}, (2, 8, 2)),
    ],
)
def test_the_counts_of_a_batch_follow_from_its_size(given, counts):
    sampler = HTL(range(200), **given).sampler
    assert (sampler.num_anchors, sampler.neighborhood_size, sampler.samples_per_class) == counts


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"batch_size": 100},
            "batch_size=100 does not fit neighborhood_size=4 .* samples_per_class=4; make it a multiple of 16",
        ),
        ({"batch_size": 8}, "make it a multiple of 16"),
        (
            {"batch_size": 25, "num_anchors": 2, "neighborhood_size": 3, "samples_per_class": 4},
            "make it 24, or leave it out",
        ),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"num_anchors": 0}, "num_anchors must be an integer of at least 1"),
    ],
)
def test_batch_sizes_that_do_not_fit_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        HTL(range(40), **given)


def test_a_large_batch_keeps_enough_neighbors():
    htl = HTL(range(200), num_anchors=40, neighborhood_size=4, samples_per_class=2)
    assert htl.tree.max_neighbors == 159


@pytest.mark.parametrize(
    "shape, message",
    [
        (
            (2, 3, 1),
            r"samples_per_class=1: no sample of a batch has a positive, .* zero for ever; take two classes or more, two",
        ),
        (
            (1, 1, 4),
            r"samples_per_class=4: no sample of a batch has a negative, .* zero for ever; take two classes or more, two",
        ),
    ],
)
def test_batches_without_triplets_are_refused(shape, message):
    arguments = dict(zip(("num_anchors", "neighborhood_size", "samples_per_class"), shape, strict=True))
    for tree in (None, ClassTree()):
        with pytest.raises(ValueError, match=message):
            HTL(range(20), tree=tree, **arguments)
    assert len(next(iter(AnchorNeighborSampler(range(20), ClassTree(), **arguments)))) == math.prod(shape)


def test_a_tree_of_ones_own():
    arguments = {"labels": range(20), "num_anchors": 2, "neighborhood_size": 3, "samples_per_class": 2}
    tree = ClassTree(5, linkage="average", max_neighbors=1)
    htl = HTL(tree=tree, **arguments)
    assert htl.tree is htl.sampler.tree is htl.miner.tree is tree
    assert (tree.num_levels, tree.linkage, tree.max_neighbors) == (5, "average", 1)
    for setting in ({"num_levels": 5}, {"linkage": "single"}):
        with pytest.raises(ValueError, match="leave both out, or leave out the tree"):
            HTL(tree=tree, **arguments, **setting)
    with pytest.raises(TypeError, match="tree must be a ClassTree"):
        HTL(tree=3, **arguments)
    default = HTL(**arguments).tree
    assert (default.num_levels, default.linkage) == (16, "single")


def test_a_plain_loop_learns_and_refreshes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30).repeat_interleave(8)
    inputs = torch.randn(30, 12, generator=generator)[labels] + 0.5 * torch.randn(240, 12, generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    htl = HTL(labels, num_anchors=3, neighborhood_size=3, samples_per_class=4, batches_per_epoch=20, seed=0)
    refresh = htl.refresh_hook(TensorDataset(inputs, labels))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    spread_to_distance = []
    for _ in range(5):
        for x, y in DataLoader(TensorDataset(inputs, labels), batch_sampler=htl.sampler):
            optimizer.zero_grad()
            htl.loss(model(x), y).backward()
            optimizer.step()
        refresh.refresh(model)
        spread_to_distance.append(htl.tree.average_spread / htl.tree.merge_heights.mean())
    assert refresh.num_refreshes == 5
    assert spread_to_distance[-1] < 0.7 * spread_to_distance[0]  # classes tighter than the gaps between them


@pytest.mark.slow
def test_it_works_without_the_extras():
    """`pip install .` alone: no faiss, record-keeper, tensorboard or matplotlib."""
    code = """
import sys
for name in ("faiss", "record_keeper", "tensorboard", "matplotlib", "pandas", "typer", "rich"):
    sys.modules[name] = None
import torch, pml_htl, pml_htl.plots
labels = torch.arange(20).repeat_interleave(4)
embeddings = torch.randn(80, 8)
htl = pml_htl.HTL(labels, num_anchors=2, neighborhood_size=3, samples_per_class=2)
htl.tree.fit_embeddings(embeddings, labels)
batch = next(iter(htl.sampler))
assert htl.loss(embeddings[batch], labels[batch]) > 0
try:
    pml_htl.plots.plot_tree(htl.tree)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install matplotlib" in done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.failed == 0 and (outcome.attempted > 0 or module not in WITH_EXAMPLES)


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_documented_and_typed(module):
    module = importlib.import_module(module)
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    for thing in own:
        members = [thing, *vars(thing).values()] if inspect.isclass(thing) else [thing]
        for member in members:
            member = getattr(member, "fget", member)
            if not inspect.isfunction(member) or member.__name__.startswith("_"):
                continue
            assert "return" in member.__annotations__, f"{member.__qualname__} has no return type"
            assert member.__doc__, f"{member.__qualname__} has no docstring"
        assert not inspect.isclass(thing) or thing.__name__.startswith("_") or thing.__doc__
