"""What `test_sharded` does in each of two gloo processes, with models whose weights FSDP shares out, and in one process."""

import copy
import datetime

import torch
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from ..training import make_dataset, make_htl, make_trainer
from .cases import Failing, error_of, flat, make_model, state

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    fully_shard = None

SAMPLES, BATCH = 65, 32  # two batches for the first of two processes, one for the other


def fsdp1(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2(model):
    for layer in (model[0], model[3]):
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {"FSDP": fsdp1} | ({} if fully_shard is None else {"FSDP2": fsdp2})


def make(wrap):
    data = TensorDataset(*(part[:SAMPLES] for part in make_dataset().tensors))
    htl = make_htl(data.tensors[1], num_anchors=4, neighborhood_size=2, batches_per_epoch=2)
    return data, htl, htl.refresh_hook(data, batch_size=BATCH), wrap(make_model())


def whole(model):
    """The weights of all ranks."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return flat(model.parameters()).clone()
    return flat(getattr(weight, "full_tensor", lambda weight=weight: weight)() for weight in model.parameters())


def refresh(wrap):
    """Leaves modes and weights as they were; every weight is in parts again."""
    _, htl, hook, model = make(wrap)
    model[1].eval() if wrap is not fsdp1 else model.module[1].eval()
    modes = [module.training for module in model.modules()]
    kinds = [type(weight) for weight in model.parameters()]
    before = whole(model)
    hook.refresh(model)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert [type(weight) for weight in model.parameters()] == kinds
    assert torch.equal(whole(model), before)
    return state(htl.tree)


def refresh_in_a_trainer(wrap):
    data, htl, hook, model = make(wrap)
    trainer = make_trainer(htl, data, hook, models={"trunk": model})
    hook.warmup_epochs = 0
    hook.before_training(trainer)
    return state(htl.tree)


def train(wrap):
    """Two epochs with a refresh after each; batch norm frozen."""
    data, htl, hook, model = make(wrap)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = DistributedLossWrapper(htl.loss) if torch.distributed.is_initialized() else htl.loss
    model.eval()
    for _ in range(2):
        for inputs, labels in DataLoader(data, batch_sampler=htl.sampler):
            optimizer.zero_grad()
            loss(model(inputs), labels).backward()
            optimizer.step()
        hook.refresh(model)
    return {"weights": whole(model), "nodes": htl.tree.nodes}


def failures(wrap):
    """On the rank with fewer batches, and on the one with more while the other is through with its own; then all goes on."""
    data, htl, hook, model = make(wrap)
    hook.refresh(model)
    before, found = copy.deepcopy(state(htl.tree)), {}
    for at in (1, 64):  # a sample of the second rank, and of the first one's last batch
        broken = TensorDataset(data.tensors[0].clone(), data.tensors[1])
        broken.tensors[0][at] = torch.nan
        unreadable = Failing(OSError("the disk is gone"), at=at)
        for name, dataset in (("data", unreadable), ("values", broken)):
            hook.dataset = dataset
            found[f"{name} {at}"], seconds = error_of(lambda: hook.refresh(model))
            assert seconds < 20
            assert all(torch.equal(value, before[name]) for name, value in state(htl.tree).items())
    hook.dataset = data
    hook.refresh(model)
    assert all(torch.equal(value, before[name]) for name, value in state(htl.tree).items())
    return found


def failure_in_a_forward_pass(rank, wrap):
    """Of the second rank, which then ends."""
    *_, hook, model = make(wrap)

    def fail(*_):
        raise MemoryError("no room for the activations")

    if rank == 1:
        layers = model.module if wrap is fsdp1 else model
        layers[2].register_forward_pre_hook(fail)
    found, seconds = error_of(lambda: hook.refresh(model))
    assert rank == 0 or seconds < 20
    return found


CASES = [refresh, refresh_in_a_trainer, train, failures]


def run_rank(rank, folder):
    """All cases in one of two processes; the results go to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/group", datetime.timedelta(seconds=60), 2, rank)
    found = {(name, case.__name__): case(wrap) for name, wrap in WRAPPERS.items() for case in CASES}
    found["forward"] = failure_in_a_forward_pass(rank, list(WRAPPERS.values())[-1])  # the last, as the group is broken then
    torch.save(found, folder / f"rank{rank}")
