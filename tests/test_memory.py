"""A cross-batch memory of 65,536 samples: PML's join of its pairs would need 10 GB."""

import subprocess
import sys

import pytest

from .processes import environment

SCRIPT = """
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


@pytest.mark.slow
def test_a_large_memory_takes_less_than_a_gibibyte():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert 50 < float(done.stdout) < 1024, done.stdout  # MiB beside the memory itself; and that it was measured at all
