"""What `test_distributed` trains in two processes and in one. A module of its own, since new processes import it."""

import datetime
import itertools
from dataclasses import dataclass

import torch
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper

from pml_htl.losses import CrossBatchMemory

from .. import oracle
from .shared import DTYPES, POWERS, TREES, loss_with, miner_with

WORLD, BATCH, INPUTS, DIMENSIONS, STEPS = 2, 8, 10, 5, 3
MEMORY = 2 * WORLD * BATCH  # whole batches, as the order within them is not that of one process


@dataclass(frozen=True)
class Case:
    """`memory` "batch": a memory of all samples. "keys": of half of them, the keys, with a miner of its own."""

    dtype: torch.dtype
    tree: str
    power: int
    mined: bool = False
    efficient: bool = False
    refs: bool = False
    memory: str = ""

    def __str__(self):
        names = [name for name in ("mined", "efficient", "refs") if getattr(self, name)]
        return "-".join(
            [str(self.dtype), self.tree, f"power {self.power}", *names, *([f"memory of {self.memory}"] * bool(self.memory))]
        )

    def loss_and_miner(self):
        def miner():
            return miner_with(self.tree, 0.5, self.power, type_of_triplets="semihard")

        loss = loss_with(self.tree, 0.5, self.power)
        if self.memory:
            loss = CrossBatchMemory(loss, DIMENSIONS, MEMORY, miner=miner() if self.memory == "keys" else None)
        return loss, miner() if self.mined else None


CASES = [
    Case(dtype, tree, power, *options)
    for dtype, (tree, power) in itertools.product(DTYPES, zip(TREES, POWERS, strict=True))
    for options in [
        *itertools.product([False, True], repeat=3),
        (False, False, False, "batch"),
        (True, False, False, "batch"),
        (False, False, False, "keys"),
    ]
]


def vector(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def train(case, rank=None):
    """Losses, gradients, weights and memory of one of two processes, or without `rank` of one that has the whole batches."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, 10), torch.nn.Tanh(), torch.nn.Linear(10, DIMENSIONS)).to(case.dtype)
    loss, miner = case.loss_and_miner()
    memory, value_of = loss, value
    if rank is not None:
        model = torch.nn.parallel.DistributedDataParallel(model)
        loss = DistributedLossWrapper(loss, efficient=case.efficient)
        miner = miner and DistributedMinerWrapper(miner, efficient=case.efficient)
    elif case.efficient:
        value_of = value_of_each_rank
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values, gradients = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(2, WORLD * BATCH, INPUTS, generator=generator, dtype=torch.float64).to(case.dtype)
        labels = torch.randint(3, (2, WORLD * BATCH), generator=generator)
        if rank is not None:
            inputs, labels = (both[:, rank * BATCH : (rank + 1) * BATCH] for both in (inputs, labels))
        with_refs = case.refs or case.memory == "keys"
        embeddings = model(torch.cat([*inputs]) if with_refs else inputs[0])
        embeddings, refs = embeddings.chunk(2) if with_refs else (embeddings, None)
        result = value_of(case, loss, miner, embeddings, labels[0], refs, labels[1] if with_refs else None)
        optimizer.zero_grad()
        result.backward()
        optimizer.step()
        values.append(result.detach())
        gradients.append(vector(parameter.grad for parameter in model.parameters()))
    found = {"values": torch.stack(values), "gradients": torch.stack(gradients), "weights": vector(model.parameters())}
    if case.memory:
        found |= {"embeddings": memory.embedding_memory, "labels": memory.label_memory}
    return found


def value(case, loss, miner, embeddings, labels, refs, ref_labels):
    if case.memory == "keys":
        mask = torch.arange(2 * len(labels)) >= len(labels)
        return loss(torch.cat([embeddings, refs.detach()]), torch.cat([labels, ref_labels]), enqueue_mask=mask)
    indices = miner(embeddings, labels, refs, ref_labels) if miner else None
    return loss(embeddings, labels, indices, *([] if case.memory else [refs, ref_labels]))


def value_of_each_rank(case, loss, miner, embeddings, labels, refs, ref_labels):
    """`efficient=True`: every process compares its samples with all, but holds fast those of the others."""
    refs, ref_labels = (embeddings, labels) if refs is None else (refs, ref_labels)
    total = 0
    for rank in range(WORLD):
        own = slice(rank * BATCH, (rank + 1) * BATCH)
        held = refs.detach().clone()
        held[own] = refs[own]
        if miner:
            a, p, n = miner(embeddings[own], labels[own], held, ref_labels)
        else:
            a, p, n = torch.tensor(oracle.triplets(labels[own].tolist(), ref_labels.tolist())).T
        others = p != a + rank * BATCH  # the wrapper does so with reference embeddings too
        total = total + loss(embeddings[own], labels[own], (a[others], p[others], n[others]), held, ref_labels)
    return total


def join_group(file, rank=0, world_size=1):
    timeout = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"file://{file}", timeout, world_size, rank)


def run_rank(rank, folder):
    """All cases in one of two processes; the results go to a file."""
    torch.set_num_threads(1)
    join_group(folder / "group", rank, WORLD)
    results = {str(case): train(case, rank) for case in CASES}
    for efficient in (False, True):
        loss, _ = CASES[0].loss_and_miner()
        embeddings = torch.randn(4, DIMENSIONS, generator=torch.Generator().manual_seed(rank))
        indices = tuple(torch.tensor([index]) for index in (0, 1, 2))
        try:
            DistributedLossWrapper(loss, efficient=efficient)(embeddings, indices_tuple=indices)
        except ValueError as error:
            results[f"without labels {efficient}"] = str(error)
    torch.save(results, folder / f"rank{rank}")
    torch.distributed.destroy_process_group()
