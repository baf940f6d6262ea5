"""What would take gigabytes by PML's own arithmetic: the pairs of a cross-batch memory, an evaluation of many classes."""

import subprocess
import sys

import pytest

from .processes import environment

CROSS_BATCH = """
import numpy as np
import torch
from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.tree.linkage import cut_levels, merge_thresholds
from pml_htl.losses import CrossBatchMemory
from tests.peak import peak

NUM_CLASSES, MEMORY, BATCH, DIMENSIONS = 10_000, 65_536, 128, 128
# A tree of that many classes as a chain, loaded; to fit one takes more memory than the loss.
edges = np.stack([np.arange(NUM_CLASSES - 1), np.arange(1, NUM_CLASSES)], axis=1)
heights, thresholds = np.linspace(0.4, 3.5, NUM_CLASSES - 1), merge_thresholds(0.5, 16)
tree = ClassTree()
tree.load_state_dict({
    **tree.state_dict(),
    "labels": torch.arange(NUM_CLASSES),
    "thresholds": torch.from_numpy(thresholds),
    "spreads": torch.full((NUM_CLASSES,), 0.5, dtype=torch.float64),
    "average_spread": torch.tensor(0.5, dtype=torch.float64),
    "nodes": torch.from_numpy(cut_levels(edges, heights, thresholds)),
    "merge_edges": torch.from_numpy(edges),
    "merge_heights": torch.from_numpy(heights),
    "nearest_classes": torch.arange(NUM_CLASSES).roll(1).unsqueeze(1),
})
loss = CrossBatchMemory(HierarchicalTripletLoss(DynamicMarginMiner(tree)), DIMENSIONS, MEMORY)
torch.manual_seed(0)
loss.add_to_memory(torch.randn(MEMORY, DIMENSIONS), torch.randint(NUM_CLASSES, (MEMORY,)), MEMORY)

before = peak()
for _ in range(2):
    embeddings = torch.randn(BATCH, DIMENSIONS, requires_grad=True)
    loss(embeddings, torch.randint(NUM_CLASSES, (BATCH,))).backward()
    assert (embeddings.grad != 0).any()
assert loss.has_been_filled
print((peak() - before) / 2**20)
"""
EVALUATION = """
import torch
from benchmarks.training.evaluation import RecallCalculator
from tests.peak import peak

NUM_CLASSES = 5_000  # of ten samples: nine bytes for each class and sample are 2 GiB
labels = torch.arange(NUM_CLASSES)
gallery = torch.nn.functional.normalize(torch.randn(10 * NUM_CLASSES, 4))
calculator = RecallCalculator((), include=("mean_average_precision_at_r",), device=torch.device("cpu"))

before = peak()
calculator.get_accuracy(gallery[:NUM_CLASSES], labels, gallery, labels.repeat(10), ref_includes_query=True)
print((peak() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, least, most",  # MiB beside what was there before; the least tells that it was measured at all
    [pytest.param(CROSS_BATCH, 50, 1024, id="cross-batch memory"), pytest.param(EVALUATION, 2, 300, id="evaluation")],
)
def test_peak(script, least, most):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert least < float(done.stdout) < most, done.stdout
