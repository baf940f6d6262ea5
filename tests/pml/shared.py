"""Our classes at a constant margin, where PML's own tests have `TripletMarginLoss` and `TripletMarginMiner`."""

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss

from ..rounding import largest, tolerance

MARGIN = 0.2
NUM_CLASSES = 32
DTYPES = [torch.float32, torch.float64]
TREES = ["unfitted", "fitted"]
POWERS = [1, 2]


def miner_with(tree, margin=MARGIN, power=2, **kwargs):
    """A miner whose margin is the same for every pair of the classes 0 .. NUM_CLASSES - 1."""
    distance = LpDistance(power=power)
    if tree == "unfitted":
        return DynamicMarginMiner(ClassTree(), beta=9.0, initial_margin=margin, distance=distance, **kwargs)
    # Every class is the same two opposite points: all spreads are 4 and so is d_0, all distances between classes are 2,
    # all classes meet at level 0, and alpha = beta + d_0 - s = beta. No number of this is rounded, or ties would fall apart.
    labels = torch.arange(NUM_CLASSES).repeat_interleave(2)
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    fitted = ClassTree().fit_embeddings(points.repeat(NUM_CLASSES, 1), labels)
    return DynamicMarginMiner(fitted, beta=margin, initial_margin=9.0, distance=distance, **kwargs)


def loss_with(tree, margin=MARGIN, power=2, **kwargs):
    return HierarchicalTripletLoss(miner_with(tree, margin, power), **kwargs)


def on_a_circle(angles, dtype, device):
    """Points in the plane at the angles given in degrees, with lengths 1, 2, 3, ..."""
    radians = torch.as_tensor(angles, dtype=torch.float64).deg2rad()
    lengths = torch.arange(1, len(radians) + 1)
    points = lengths.unsqueeze(1) * torch.stack([radians.cos(), radians.sin()], dim=1)
    return points.to(device, dtype).requires_grad_()


def random_batch(size, dtype, device, seed=0, num_labels=4, dimensions=6):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(size, dimensions, generator=generator, dtype=torch.float64)
    return embeddings.to(device, dtype), torch.randint(num_labels, (size,), generator=generator).to(device)


def assert_close(actual, expected):
    atol = tolerance(expected.dtype, largest(expected)) if expected.is_floating_point() else 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_tree = pytest.mark.parametrize("tree", TREES)
each_power = pytest.mark.parametrize("power", POWERS)
