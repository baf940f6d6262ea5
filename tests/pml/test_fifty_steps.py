"""Training with our memory and loss at a constant margin, and with PML's: the same losses, the same weights."""

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import TripletMarginMiner

from pml_htl.losses import CrossBatchMemory

from ..rounding import tolerance
from .shared import MARGIN, each_dtype, each_power, each_tree, loss_with, miner_with, random_batch

pytestmark = pytest.mark.numerical

BATCH, INPUTS, DIMENSIONS, MEMORY = 12, 6, 4, 40
# In float32 there is a triplet within 1e-7 of its margin later on, where rounding decides; until then within 6e-6.
STEPS = {torch.float64: 50, torch.float32: 10}


def network(dtype, device):
    torch.manual_seed(0)
    layers = torch.nn.Linear(INPUTS, 16), torch.nn.Tanh(), torch.nn.Linear(16, DIMENSIONS)
    return torch.nn.Sequential(*layers).to(device, dtype)


def trained(memory, mask, dtype, device):
    """The loss of each step and the weights at the end."""
    model, losses = network(dtype, device), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS[dtype]):
        inputs, labels = random_batch(BATCH, dtype, device, seed=step, dimensions=INPUTS)
        inputs[:, 0] += labels  # something to learn
        loss = memory(model(inputs), labels, enqueue_mask=mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("mode", ["all pairs", "miner", "enqueue_mask"])
@each_dtype
@each_tree
@each_power
def test_fifty_steps(mode, dtype, tree, power, device):
    distance = LpDistance(power=power)
    miners = None, None
    if mode == "miner":
        miners = (
            miner_with(tree, MARGIN, power, type_of_triplets="semihard"),
            TripletMarginMiner(MARGIN, "semihard", distance=distance),
        )
    ours = CrossBatchMemory(loss_with(tree, power=power), DIMENSIONS, MEMORY, miner=miners[0])
    pmls = pml_losses.CrossBatchMemory(
        pml_losses.TripletMarginLoss(MARGIN, distance=distance), DIMENSIONS, MEMORY, miner=miners[1]
    )
    mask = torch.arange(BATCH, device=device) % 2 == 0 if mode == "enqueue_mask" else None
    our_losses, our_weights = trained(ours, mask, dtype, device)
    pml_losses_, pml_weights = trained(pmls, mask, dtype, device)
    allowed = tolerance(dtype, steps=STEPS[dtype])
    assert our_losses == pytest.approx(pml_losses_, rel=0, abs=4 * allowed)  # as steep as a loss may be, in the weights
    torch.testing.assert_close(our_weights, pml_weights, rtol=0, atol=allowed)
    start = torch.nn.utils.parameters_to_vector(network(dtype, device).parameters())
    assert (our_weights - start).abs().max() > 0.01
    assert ours.queue_idx == pmls.queue_idx and ours.has_been_filled
