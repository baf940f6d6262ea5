"""What a user's type checker makes of the public names: what they give is not silently Any, and wrong calls are errors.

Needs mypy. That the package itself is clean is not tested here but by `mypy`, which reads its settings from pyproject.toml.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# A line that should be an error has `type: ignore` with its code; mypy's strict mode tells if there is none to ignore.
USE = """
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import pml_htl
from pml_htl import (
    HTL, AnchorNeighborSampler, ClassStatistics, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss, TreeRefresh,
)
from pml_htl.checkpoint import Checkpoint, CheckpointHook
from pml_htl.distributed import Ranks, is_distributed
from pml_htl.losses import CrossBatchMemory, SelfSupervisedLoss
from pml_htl.plots import add_to_tensorboard, plot_tree

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
labels = torch.arange(20).repeat_interleave(8)
embeddings = torch.randn(160, 8)
assert_type(pml_htl.__version__, str)

htl = HTL(labels, num_anchors=2, neighborhood_size=3, samples_per_class=4, temperature=0.05)
assert_type(htl.tree, ClassTree)
assert_type(htl.sampler, AnchorNeighborSampler)
assert_type(htl.miner, DynamicMarginMiner)
assert_type(htl.loss, HierarchicalTripletLoss)
assert_type(htl.batch_size, int)
HTL(labels.numpy(), num_anchors=2, neighborhood_size=3, samples_per_class=4, tree=ClassTree(linkage="average"))
HTL([0, 0, 1, 1], 8, neighborhood_size=2, form="paper")
HTL()  # type: ignore[call-arg]

assert_type(htl.loss(embeddings, labels), torch.Tensor)
assert_type(htl.loss(embeddings, [1, 2, 3], ref_emb=embeddings, ref_labels=labels), torch.Tensor)
assert_type(htl.loss(embeddings, labels, htl.miner(embeddings, labels)), torch.Tensor)
htl.loss([0.1, 0.2], labels)  # type: ignore[arg-type]
assert_type(htl.miner(embeddings, labels), Triplets)
assert_type(htl.miner.margins(labels.unsqueeze(1), labels), torch.Tensor)
CrossBatchMemory(htl.loss, 8)
SelfSupervisedLoss(htl.loss)

statistics = ClassStatistics(labels, 8)
assert_type(statistics.update(embeddings, labels), ClassStatistics)
assert_type(statistics.merge(statistics), ClassStatistics)
assert_type(statistics.means, torch.Tensor)
assert_type(statistics.labels, torch.Tensor)
assert_type(statistics.embedding_size, int)
assert_type(statistics.squared_distances(slice(3)), torch.Tensor)

tree = ClassTree().fit(statistics, ranks=Ranks())
assert_type(tree, ClassTree)
assert_type(ClassTree.from_taxonomy(range(4), np.zeros((4, 1), dtype=int)), ClassTree)
assert_type(ClassTree.from_distances([1, 2], [[0.0, 1.0], [1.0, 0.0]]), ClassTree)
assert_type(tree.fit_embeddings(embeddings, labels).is_fitted, bool)
assert_type(tree.neighbors(labels, 3), torch.Tensor)
tree.neighbors(labels, k="3")  # type: ignore[arg-type]
assert_type(tree.merge_levels(1, [2, 3]), torch.Tensor)
assert_type(tree.labels, torch.Tensor | None)
tree.labels + 1  # type: ignore[operator]
assert_type(tree.part("labels") + 1, torch.Tensor)
assert_type(tree.d_0, float)
assert_type(tree.to_scipy_linkage(), np.ndarray)

for batch in htl.sampler:
    assert_type(batch, list[int])
assert_type(htl.sampler.batch_size, int)
assert_type(htl.sampler.labels, np.ndarray)
dataset = TensorDataset(embeddings, labels)
DataLoader(dataset, batch_sampler=htl.sampler)

refresh = htl.refresh_hook(dataset, then=print)
assert_type(refresh, TreeRefresh)
refresh.refresh(torch.nn.Linear(8, 8), device="cpu")
assert_type(refresh.num_refreshes, int)
assert_type(refresh.seconds, float)
TreeRefresh(tree, dataset, every_n_epochs="2")  # type: ignore[arg-type]

checkpoint = Checkpoint(Path("run") / "checkpoint.pt", sampler=htl.sampler, refresh=refresh)
checkpoint.save(step=3)
assert_type(checkpoint.load(), dict[str, Any] | None)
assert_type(CheckpointHook("checkpoint.pt", then=refresh).resume(object()), int)
assert_type(is_distributed(), bool)
assert_type(Ranks().rank, int)

assert_type(plot_tree(tree, [1, 2], name=str), Axes)
add_to_tensorboard(tree, object(), step=0)
"""


def test_public_names_have_types(tmp_path):
    (tmp_path / "use.py").write_text(USE, encoding="utf-8")
    # With the settings and the cache of `mypy` in the repository, so that it takes 15 seconds only the first time; in a
    # process of its own, since mypy leaves hundreds of megabytes behind.
    command = [sys.executable, "-m", "mypy", str(tmp_path / "use.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("Success"), done.stdout + done.stderr
