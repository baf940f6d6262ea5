"""What `test_processes` does in each of several gloo processes, and in one. A module of its own: new processes import it.

Each case takes the rank and the number of processes, and gives tensors and texts to compare. One process has no group.
"""

import copy
import datetime
import random
import time

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pml_htl import HTL, ClassStatistics, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss, TreeRefresh
from pml_htl.distributed import Ranks
from pml_htl.tree import class_tree as trees

from .. import oracle
from ..test_scale import clustered_statistics, many_classes
from ..training import INPUTS, make_dataset, make_htl, make_trainer

BATCH, DIMENSIONS = 12, 6


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 8)
    )
    model[1].running_mean.uniform_(-0.5, 0.5)
    return model.to(dtype)


def in_processes(model, world):
    return model if world == 1 else DistributedDataParallel(model)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def state(tree):
    return dict(tree.state_dict())


def error_of(work):
    """The error that it ends in, and the seconds until then."""
    start = time.perf_counter()
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start
    return "none", 0.0


# Statistics and trees


def statistics(rank, world):
    """Shards of different sizes, each without some classes of the others."""
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(97, 5, generator=generator), torch.arange(97) % 10 - 4
    own = torch.arange(97) % 5 % world == rank
    found = ClassStatistics(labels[own], 5).update(embeddings[own], labels[own]).all_reduce()
    return {name: getattr(found, name) for name in ("labels", "counts", "means", "spreads", "average_spread")}


def statistics_that_do_not_fit(rank, world):
    found = ClassStatistics([1, 2], 3 + rank).update(torch.ones(1, 3 + rank), [1])
    error, _ = error_of(found.all_reduce)
    return {"error": error, "counts": found.counts}


def fit_at_scale(rank, world):
    """Lists and bridges are shared."""
    found = {}
    for search in ("halves", "rows"):
        with many_classes(search):
            tree = ClassTree(max_neighbors=3).fit(clustered_statistics(400, 8, num_groups=12), ranks=Ranks())
        found |= {f"{search} {name}": value for name, value in state(tree).items()}
    return found


def fit_in_a_group(rank, world):
    """Of the processes with odd ranks."""
    if world == 1:
        return {"nodes": ClassTree(max_neighbors=3).fit(clustered_statistics(40, 8, num_groups=4)).nodes}
    group = torch.distributed.new_group(list(range(1, world, 2)))
    if rank % 2 == 0:
        return {}
    with many_classes():
        tree = ClassTree(max_neighbors=3).fit(clustered_statistics(40, 8, num_groups=4), ranks=Ranks(group))
    return {"nodes": tree.nodes}


# Refreshes


def refresh(rank, world):
    """A model with batch norm, and shards of different numbers of batches."""
    data = TensorDataset(*(part[:103] for part in make_dataset().tensors))
    htl = make_htl(data.tensors[1], num_anchors=4, neighborhood_size=2)
    model = in_processes(make_model(), world)
    hook = htl.refresh_hook(data, batch_size=7)
    before = copy.deepcopy(model.state_dict())
    hook.refresh(model)
    assert all(map(torch.equal, before.values(), model.state_dict().values())) and model.training
    return state(htl.tree)


def refresh_of_a_part(rank, world):
    """Of some samples of each class, other ones each time."""
    data = make_dataset()
    htl = make_htl(data.tensors[1], num_anchors=4, neighborhood_size=2)
    hook = htl.refresh_hook(data, samples_per_class=3)
    hook.refresh(make_model())
    hook.refresh(make_model())
    return state(htl.tree)


def refresh_in_a_trainer(rank, world):
    data = make_dataset()
    htl = make_htl(data.tensors[1], num_anchors=4, neighborhood_size=2)
    hook = htl.refresh_hook(data)
    trainer = make_trainer(htl, data, hook, lr=0.0)
    trainer.models = {name: in_processes(model, world) for name, model in trainer.models.items()}
    wrapped = dict(trainer.models)
    for name, model in trainer.models.items():
        model.eval() if name == "trunk" else model.train()
    hook.warmup_epochs = 0
    hook.before_training(trainer)
    assert trainer.models == wrapped
    return state(htl.tree)


class Failing(Dataset):
    """A data set that cannot give one of its samples."""

    def __init__(self, error=None, at=1):
        self.data, self.error, self.at = make_dataset(), error, at

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == self.at and self.error is not None:
            raise self.error
        return self.data[index]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(make_dataset())


def failures(rank, world):
    """Each on one rank, the last; all end with it, and keep the old tree."""
    data = make_dataset()
    htl = make_htl(data.tensors[1], num_anchors=4, neighborhood_size=2)
    htl.refresh_hook(data).refresh(make_model())
    before, found = state(htl.tree), {}
    last = world - 1

    def attempt(name, dataset, model=None):
        model = make_model() if model is None else model
        found[name], seconds = error_of(lambda: htl.refresh_hook(dataset, labels=data.tensors[1]).refresh(model))
        assert seconds < 20
        now = state(htl.tree)
        assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)

    attempt("data", Failing(OSError("the disk is gone"), at=last))  # every process has it; it is in the share of the last
    attempt("workers", Failing(KeyboardInterrupt("Ctrl-C"), at=last))
    broken = make_model()
    if rank == last:
        torch.nn.init.constant_(broken[3].weight, torch.nan)
    attempt("values", data, broken)
    narrow = make_model()
    if rank == last:
        narrow[3] = torch.nn.Linear(16, 5)
    attempt("size", data, narrow)
    some = data.tensors[1] != data.tensors[1][0]
    attempt("classes", TensorDataset(*(part[some] for part in data.tensors)))
    attempt("endless", Endless())
    attempt("few", TensorDataset(*(part[: world - 1] for part in data.tensors)) if world > 1 else TensorDataset())
    cut = trees.linkages.cut_levels
    if rank == 0:
        trees.linkages.cut_levels = lambda *_: (_ for _ in ()).throw(MemoryError("no room for the nodes"))
    attempt("fit", data)
    trees.linkages.cut_levels = cut
    htl.refresh_hook(data).refresh(make_model())  # and all goes on
    return {**found, "nodes": htl.tree.nodes}


# Batches, losses and training


def batches(rank, world):
    data = make_dataset()
    htl = make_htl(data.tensors[1], num_anchors=4, neighborhood_size=2, batches_per_epoch=3)
    htl.refresh_hook(data).refresh(make_model())
    drawn = [batch for _ in range(2) for batch in htl.sampler]
    assert htl.batch_size == len(drawn[0])
    return {"batches": torch.tensor(drawn), "tree": htl.tree.nodes}


def without_a_seed(rank, world):
    labels = make_dataset().tensors[1]
    make = {"num_anchors": 4, "neighborhood_size": 2, "samples_per_class": 2}
    return {"error": error_of(lambda: list(HTL(labels, **make).sampler))[0]}


def real_loss(power=2, **kwargs):
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(4, DIMENSIONS, generator=generator, dtype=torch.float64)
    labels = torch.arange(4).repeat_interleave(3)
    samples = centres[labels] + 0.4 * torch.randn(12, DIMENSIONS, generator=generator, dtype=torch.float64)
    tree = ClassTree(64).fit_embeddings(samples, labels)
    return HierarchicalTripletLoss(DynamicMarginMiner(tree, distance=LpDistance(power=power)), **kwargs)


LOSSES = {
    "squared": lambda: real_loss(),
    "plain": lambda: real_loss(power=1),
    "smooth maximum": lambda: real_loss(power=1, temperature=0.05),
    "constant": lambda: HierarchicalTripletLoss(DynamicMarginMiner(ClassTree(), initial_margin=0.3)),
    "PML's": lambda: TripletMarginLoss(0.3, distance=real_loss().distance),
}


def samples_for_gradients(dtype):
    """A model and as many samples whatever the number of processes, so that one process has the same."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, 10), torch.nn.Tanh(), torch.nn.Linear(10, DIMENSIONS))
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, INPUTS, generator=generator, dtype=torch.float64)
    return model.to(dtype), inputs.to(dtype), torch.randint(4, (48,), generator=generator)


def gradients(rank, world):
    """Of a model, through PML's wrapper, in two types; for one process of the same samples, `efficient` emulated."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        for name, make in LOSSES.items():
            for efficient in (False, True):
                model, inputs, labels = samples_for_gradients(dtype)
                model, loss = in_processes(model, world), make()
                if world > 1:
                    own = slice(rank * 48 // world, (rank + 1) * 48 // world)
                    value = DistributedLossWrapper(loss, efficient=efficient)(model(inputs[own]), labels[own])
                elif efficient:
                    continue
                else:
                    value = loss(model(inputs), labels)
                value.backward()
                found[f"{dtype} {name} {'efficient' if efficient else 'all'}"] = flat(p.grad for p in model.parameters())
    return found


def efficient_gradients_emulated(world):
    """In one process: every part compares its samples with all, but holds fast those of the others."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        for name, make in LOSSES.items():
            model, inputs, labels = samples_for_gradients(dtype)
            embeddings, total = model(inputs), 0
            for rank in range(world):
                own = slice(rank * 48 // world, (rank + 1) * 48 // world)
                held = embeddings.detach().clone()
                held[own] = embeddings[own]
                a, p, n = torch.tensor(oracle.triplets(labels[own].tolist(), labels.tolist())).T
                others = p != a + own.start
                total = total + make()(embeddings[own], labels[own], (a[others], p[others], n[others]), held, labels)
            total.backward()
            found[f"{dtype} {name} efficient"] = flat(parameter.grad for parameter in model.parameters())
    return found


class Augmented(Dataset):
    """Noise that is a sample's own, whichever process draws it."""

    def __init__(self):
        self.data = make_dataset()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, label = self.data[index]
        noise = torch.randn(INPUTS, generator=torch.Generator().manual_seed(int(index)))
        return inputs + 0.1 * noise, label


def train(rank, world, efficient=False):
    """Three epochs with a refresh after each; batch norm frozen."""
    data = make_dataset()
    htl = make_htl(data.tensors[1], num_anchors=4, neighborhood_size=2, batches_per_epoch=4)
    hook = htl.refresh_hook(data)
    model = in_processes(make_model(), world)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = htl.loss if world == 1 else DistributedLossWrapper(htl.loss, efficient=efficient)
    random.seed(rank)
    torch.manual_seed(rank)  # processes need not agree on what is random elsewhere
    for _ in range(3):
        for inputs, labels in DataLoader(Augmented(), batch_sampler=htl.sampler):
            model.eval()
            optimizer.zero_grad()
            loss(model(inputs), labels).backward()
            optimizer.step()
        hook.refresh(model)
    return {"weights": flat(model.parameters()), "nodes": htl.tree.nodes}


def streaming(rank, world):
    """Batches of the ranks' own, and batches that all of them see; no pass over a data set."""
    found = {}
    for joint in (False, True):
        data = make_dataset()
        htl = make_htl(data.tensors[1], num_anchors=4, neighborhood_size=2, batches_per_epoch=6)
        hook = htl.refresh_hook(None, mode="streaming", forget=1.0)
        model = make_model().eval()
        loss = DistributedLossWrapper(htl.loss) if joint and world > 1 else htl.loss
        if not joint:  # one rank has seen nothing yet, and most classes have not been in a batch
            hook.refresh()
            assert not htl.tree.is_fitted
            if rank == 0:
                loss(model(data.tensors[0][:9]), data.tensors[1][:9])
            hook.refresh()
            assert htl.tree.labels.tolist() == [-7, -4] and len(htl.tree.waiting) == 22
            found |= {f"early {name}": value for name, value in state(htl.tree).items()}
        for _ in range(2):
            for batch in htl.sampler:
                loss(model(data.tensors[0][batch]), data.tensors[1][batch])
            hook.refresh()
        found |= {f"{'joint' if joint else 'own'} {name}": value for name, value in state(htl.tree).items()}
    unseen = TreeRefresh(ClassTree(), None, mode="streaming", loss=htl.loss, labels=data.tensors[1])
    unseen.refresh()  # none of the ranks has seen a batch
    assert not unseen.tree.is_fitted
    return found


CASES = [
    statistics, statistics_that_do_not_fit, fit_at_scale, fit_in_a_group, refresh, refresh_of_a_part, refresh_in_a_trainer,
    failures, batches, without_a_seed, gradients, train, streaming,
]  # fmt: skip


def run_rank(rank, world, folder):
    """All cases in one of the processes; the results go to a file."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"file://{folder}/group", timeout, world, rank)
    torch.save({case.__name__: case(rank, world) for case in CASES}, folder / f"rank{rank}")
    torch.distributed.destroy_process_group()
