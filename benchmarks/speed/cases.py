"""The cases: what runs against what, at which sizes. Everything is made from seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import NTXentLoss, TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import AgglomerativeClustering
from torch.utils.data import TensorDataset

from pml_htl import (
    HTL,
    AnchorNeighborSampler,
    ClassStatistics,
    ClassTree,
    DynamicMarginMiner,
    HierarchicalTripletLoss,
    TreeRefresh,
)
from pml_htl.tree.linkage import cut_levels, merges_of_scipy

from ..training.networks import conv_net

PARTS = ("loss", "smooth loss", "miner", "sampler", "tree", "full refresh", "epoch")
MARGIN = 0.2
TEMPERATURE = 0.1
LARGEST_PEER_BATCH = 1024  # PML's mask of all triplets takes 8 GiB and more beyond
LARGEST_SCIPY = 11_318  # two matrices of 1 GiB
LARGEST_SKLEARN = 5_000  # it takes little memory, but minutes beyond
LARGEST_CHECKED = 5_000
BATCHES = 20  # of a sampler in one call
EPOCH = 50  # iterations

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """Something to time: `run` does `repeats` units of its work.

    Its role is "ours", "peer", "floor", or "alone" for one of ours that gives another result than the peers.
    """

    name: str
    role: str
    run: Callable[[], Any]
    repeats: int = 1


@dataclass(frozen=True)
class Case:
    """One comparison. `sizes`: B, t and D of a batch; C and D of a data set. `classes`: "balanced", "skewed" or, for a tree,
    "unclustered"."""

    part: str
    sizes: dict[str, int]
    classes: str = "balanced"

    def contenders(self, device: str, *, check: bool = True) -> list[Contender]:
        """Everything that runs in this case, made ready.

        Raises:
            RuntimeError: `check`, and ours does not give what the peer gives, where they should be equal.
        """
        make = {
            "loss": _losses,
            "smooth loss": _smooth_losses,
            "miner": _miners,
            "sampler": _samplers,
            "tree": _trees,
            "full refresh": _refreshes,
            "epoch": _epochs,
        }[self.part]
        return make(self, device, check)


def cases(parts: list[str], large: bool, device: str) -> list[Case]:
    """The cases of these parts. `large` adds 300,000 classes, and a million on a GPU."""
    batches = [(64, 4), (128, 4), (256, 4), (512, 4), (650, 5), (1024, 4), (2048, 4), (1024, 16), (1024, 64), (1024, 128)]
    trees = [(1_000, 128), (3_000, 128), (5_000, 128), (11_318, 512), (30_000, 128), (100_000, 128)]
    if large:
        trees += [(300_000, 64)] + [(1_000_000, 64)] * device.startswith("cuda")
    found = [Case("loss", {"B": size, "t": t, "D": 512}) for size, t in batches]
    found += [Case("loss", {"B": size, "t": t, "D": 512}, "skewed") for size, t in ((650, 5), (1024, 4))]
    found += [Case("smooth loss", {"B": size, "t": 4, "D": 512}) for size in (64, 128, 256)]  # PML's takes seconds beyond
    found += [Case("miner", {"B": size, "t": t, "D": 512}) for size, t in ((128, 4), (256, 4), (650, 5), (1024, 4))]
    found += [Case("miner", {"B": 650, "t": 5, "D": 512}, "skewed")]
    found += [Case("sampler", {"C": size, "B": 512}) for size in (1_000, 10_000, 100_000)]
    found += [Case("sampler", {"C": 10_000, "B": 512}, "skewed")]
    found += [Case("tree", {"C": size, "D": dimensions}) for size, dimensions in trees]
    found += [Case("tree", {"C": 11_318, "D": 512}, classes) for classes in ("skewed", "unclustered")]
    found += [Case("tree", {"C": 100_000, "D": 128}, "unclustered")]
    found += [Case("full refresh", {"C": 555, "N": 7_770})]
    found += [Case("epoch", {"C": 555, "B": 128})]
    return [case for case in found if case.part in parts]


# Loss and miner


def _batch(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of clustered embeddings; skewed: class sizes fall geometrically, and some classes have one sample."""
    size, mean = case.sizes["B"], case.sizes["t"]
    generator = np.random.default_rng(0)
    counts = np.full(size, mean) if case.classes == "balanced" else generator.geometric(1 / mean, size)
    labels = torch.from_numpy(np.repeat(np.arange(size), counts)[:size])
    torch_generator = torch.Generator().manual_seed(0)
    centres = torch.randn(size, case.sizes["D"], generator=torch_generator)
    noise = torch.randn(size, case.sizes["D"], generator=torch_generator)
    return (centres[labels] + 1.5 * noise).to(device), labels.to(device)


def _losses(case: Case, device: str, check: bool) -> list[Contender]:
    embeddings, labels = _batch(case, device)
    tree = ClassTree().fit_embeddings(embeddings, labels)
    miner = DynamicMarginMiner(tree)
    ours, smooth = HierarchicalTripletLoss(miner), HierarchicalTripletLoss(miner, temperature=0.05)
    pmls = TripletMarginLoss(MARGIN, distance=LpDistance(power=2))

    if check and len(labels) <= LARGEST_PEER_BATCH:
        constant = HierarchicalTripletLoss(DynamicMarginMiner(ClassTree(), initial_margin=MARGIN))
        _check_loss(constant, pmls, embeddings, labels)
    train = partial(_train, embeddings, labels)

    def gram(leaves: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        normalized = torch.nn.functional.normalize(leaves)
        return (normalized @ normalized.T).square().sum()

    def symmetric_gram(leaves: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return _Gram.apply(torch.nn.functional.normalize(leaves)).square().sum()

    found = [
        Contender("HierarchicalTripletLoss", "ours", lambda: train(ours)),
        Contender("HierarchicalTripletLoss, temperature", "alone", lambda: train(smooth)),
        Contender("autograd's Gram matrix", "floor", lambda: train(gram)),
        Contender("symmetric Gram matrix", "floor", lambda: train(symmetric_gram)),
    ]
    if len(labels) <= LARGEST_PEER_BATCH:
        found.append(Contender("TripletMarginLoss", "peer", lambda: train(pmls)))
    return found


def _smooth_losses(case: Case, device: str, check: bool) -> list[Contender]:
    """The smooth form with squared distances and no margin is NTXentLoss, times its temperature."""
    embeddings, labels = _batch(case, device)
    miner = DynamicMarginMiner(ClassTree(), beta=0.0, dynamic=False)
    ours, pmls = HierarchicalTripletLoss(miner, temperature=TEMPERATURE), NTXentLoss(TEMPERATURE / 2)
    if check:
        _check_loss(ours, lambda *batch: TEMPERATURE * pmls(*batch), embeddings, labels)
    return [
        Contender("HierarchicalTripletLoss", "ours", lambda: _train(embeddings, labels, ours)),
        Contender("NTXentLoss", "peer", lambda: _train(embeddings, labels, pmls)),
    ]


def _train(embeddings: torch.Tensor, labels: torch.Tensor, loss: Loss) -> None:
    """A forward and a backward pass of the loss."""
    leaves = embeddings.clone().requires_grad_()
    loss(leaves, labels).backward()
    _wait(str(embeddings.device))


class _Gram(torch.autograd.Function):
    """The Gram matrix with one product for its gradient, where autograd takes two."""

    @staticmethod
    def forward(ctx: Any, points: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(points)
        return points @ points.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (points,) = ctx.saved_tensors
        return (gradient + gradient.T) @ points


def _check_loss(ours: Loss, pmls: Loss, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
    """Value and gradient must be PML's. In float64: in float32 a triplet may be a rounding away from zero, and so count."""
    found = []
    for loss in (ours, pmls):
        leaves = embeddings.double().requires_grad_()
        value = loss(leaves, labels)
        value.backward()
        found.append((value.detach(), leaves.grad))
    for mine, theirs in zip(*found, strict=True):
        if not torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max())):
            raise RuntimeError("our loss and PML's differ where they should be equal")


def _miners(case: Case, device: str, check: bool) -> list[Contender]:
    embeddings, labels = _batch(case, device)
    fitted = DynamicMarginMiner(ClassTree().fit_embeddings(embeddings, labels))
    ours = DynamicMarginMiner(ClassTree(), initial_margin=MARGIN)
    pmls = TripletMarginMiner(MARGIN, distance=LpDistance(power=2))
    if check and not all(map(torch.equal, ours(embeddings, labels), pmls(embeddings, labels))):
        raise RuntimeError("DynamicMarginMiner and TripletMarginMiner find different triplets at the same margin")

    def mine(miner: Callable[..., Any]) -> None:
        miner(embeddings, labels)
        _wait(device)

    return [
        Contender("DynamicMarginMiner, same margin", "ours", lambda: mine(ours)),
        Contender("TripletMarginMiner", "peer", lambda: mine(pmls)),
        Contender("DynamicMarginMiner, fitted tree", "alone", lambda: mine(fitted)),
    ]


# Sampler and tree


def class_statistics(case: Case) -> ClassStatistics:
    """Statistics of clustered classes: groups of 300 about, as in the embeddings of a trained network.

    Balanced: two samples of each class; skewed: a geometric number; unclustered: two samples, and no groups, so that no
    class is near another. Embeddings come in portions, as from a loader.
    """
    num_classes, dimensions = case.sizes["C"], case.sizes.get("D", 16)
    generator = np.random.default_rng(0)
    counts = generator.geometric(0.3, num_classes) if case.classes == "skewed" else np.full(num_classes, 2)
    torch_generator = torch.Generator().manual_seed(0)

    def directions(number: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(number, dimensions, generator=torch_generator))

    groups = directions(max(4, num_classes // 300))
    statistics = ClassStatistics(torch.arange(num_classes), dimensions)
    for classes in torch.arange(num_classes).split(10_000):
        group = torch.from_numpy(generator.integers(len(groups), size=len(classes)))
        centres = torch.nn.functional.normalize(
            (case.classes != "unclustered") * groups[group] + 0.7 * directions(len(classes))
        )
        samples = torch.repeat_interleave(torch.arange(len(classes)), torch.from_numpy(counts[classes]))
        statistics.update(centres[samples] + 0.3 * directions(len(samples)), classes[samples])
    return statistics


def _samplers(case: Case, device: str, check: bool) -> list[Contender]:
    num_classes, batch_size = case.sizes["C"], case.sizes["B"]
    generator = np.random.default_rng(0)
    counts = (
        np.full(num_classes, 10) if case.classes == "balanced" else np.minimum(generator.zipf(1.6, num_classes), 500) + 1
    )
    labels = np.repeat(np.arange(num_classes), counts)
    shape = {"num_anchors": batch_size // 32, "neighborhood_size": 8, "samples_per_class": 4}
    tree = ClassTree().fit(class_statistics(case))
    theirs = MPerClassSampler(labels, 4, batch_size, length_before_new_iter=BATCHES * batch_size)
    found = [Contender("MPerClassSampler", "peer", lambda: list(theirs), BATCHES)]
    for name, state in (("AnchorNeighborSampler", tree), ("AnchorNeighborSampler, unfitted tree", ClassTree())):
        ours = AnchorNeighborSampler(labels, state, **shape, batches_per_epoch=BATCHES, seed=0)
        found.insert(-1, Contender(name, "ours", partial(list, ours), BATCHES))
    return found


def _trees(case: Case, device: str, check: bool) -> list[Contender]:
    statistics = class_statistics(case)
    num_classes = case.sizes["C"]
    means = statistics.means.float().to(device)

    def product() -> None:
        for rows in means.split(1024):
            for columns in means.split(4096):  # blocks that stay in the cache
                torch.mm(rows, columns.T)
        _wait(device)

    def scipy_linkage() -> np.ndarray:
        distances = statistics.squared_distances().fill_diagonal_(0).numpy()
        return linkage(squareform(distances, checks=False), "single")

    def sklearn_linkage() -> None:
        AgglomerativeClustering(n_clusters=None, distance_threshold=0.0, linkage="single").fit(statistics.means.numpy())

    if check and num_classes <= LARGEST_CHECKED:
        _check_nodes(ClassTree().fit(statistics, device=device), scipy_linkage())
    found = [
        Contender("ClassTree.fit", "ours", lambda: ClassTree().fit(statistics, device=device)),
        Contender("product of all class means", "floor", product),
    ]
    if num_classes <= LARGEST_SCIPY:
        found.append(Contender("scipy linkage", "peer", scipy_linkage))
    if num_classes <= LARGEST_SKLEARN:
        found.append(Contender("scikit-learn clustering", "peer", sklearn_linkage))
    return found


def _check_nodes(tree: ClassTree, merges: np.ndarray) -> None:
    """The nodes must be those of scipy's merges, except where a height is a rounding away from a threshold."""
    (edges, heights), thresholds = merges_of_scipy(merges), tree.part("thresholds").numpy()
    sure = np.abs(heights[:, np.newaxis] - thresholds).min(axis=0) > 2e-6
    if not np.array_equal(cut_levels(edges, heights, thresholds)[:, sure], tree.part("nodes").numpy()[:, sure]):
        raise RuntimeError("the tree's nodes are not those of scipy's single linkage")


# A refresh and an epoch


def _images(case: Case, device: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The network of the comparison, and images as many and as large as the glyphs with their labels."""
    labels = torch.arange(case.sizes["C"]).repeat_interleave(14)
    images = torch.rand(len(labels), 1, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    return conv_net(1, torch.Generator().manual_seed(0)).to(device), images, labels


def _refreshes(case: Case, device: str, check: bool) -> list[Contender]:
    """A whole refresh beside the forward passes that it needs."""
    network, images, labels = _images(case, device)
    refresh = TreeRefresh(ClassTree(), TensorDataset(images, labels))

    @torch.no_grad()
    def embed(batch_size: int) -> None:
        network.eval()
        for batch in images.split(batch_size):
            network(batch)
        _wait(device)

    return [
        Contender("TreeRefresh", "ours", lambda: refresh.refresh(network)),
        *(Contender(f"{size} at a time", "floor", partial(embed, size)) for size in (64, 256)),
    ]


def _epochs(case: Case, device: str, check: bool) -> list[Contender]:
    """Training, with one refresh at the end."""
    # One network for all: where another lies in memory makes more of a difference than what is measured here.
    network, images, labels = _images(case, device)
    shape: dict[str, Any] = {"form": "paper", "batch_size": case.sizes["B"]}
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def contender(name: str, role: str, mode: str | None) -> Contender:
        torch.manual_seed(0)
        htl = HTL(labels, **shape, batches_per_epoch=EPOCH, seed=0)
        htl.tree.fit_embeddings(torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(0)), labels)
        loss = htl.loss if mode else TripletMarginLoss(MARGIN)
        refresh = htl.refresh_hook(TensorDataset(images, labels), mode=mode) if mode else None

        def epoch() -> None:
            for batch in htl.sampler:
                optimizer.zero_grad()
                loss(network(images[batch]), labels[batch]).backward()
                optimizer.step()
            if refresh is not None:
                refresh.refresh(network)
            _wait(device)

        return Contender(name, role, epoch, EPOCH)

    return [
        contender("HTL, streaming refresh", "ours", "streaming"),
        contender("TripletMarginLoss", "peer", None),
        contender("HTL, full refresh", "ours", "full"),
    ]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
