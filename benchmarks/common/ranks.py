"""The benchmarks under torchrun: the process group, and what is for one of its processes to do."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

PATIENCE = datetime.timedelta(hours=1)  # the others wait while the first tests a model


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the group that torchrun has made, if it has started this process; of GPUs if there is one for each process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpus else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def number_of_processes() -> int:
    """How many there are; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own_rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that tests, prints and writes."""
    return own_rank() == 0


def from_first(value: Any) -> Any:
    """The value that the first process has."""
    values = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(values)
    return values[0]


def shared_model(model: torch.nn.Module) -> torch.nn.Module:
    """With the gradients of all processes."""
    has_gradients = any(parameter.requires_grad for parameter in model.parameters())
    return DistributedDataParallel(model) if number_of_processes() > 1 and has_gradients else model


def shared_loss(loss: torch.nn.Module) -> torch.nn.Module:
    """Of the batch of all processes; proxies get the gradients of all, so that they stay the same."""
    return loss if number_of_processes() == 1 else shared_model(DistributedLossWrapper(loss))


def shared_miner(miner: torch.nn.Module | None) -> torch.nn.Module | None:
    """In the batch of all processes."""
    return miner if miner is None or number_of_processes() == 1 else DistributedMinerWrapper(miner)


def wait_for_all() -> None:
    """Until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def group_of_this_process() -> distributed.ProcessGroup | None:
    """A group of this process alone; all processes must ask for theirs. None without torchrun."""
    if not distributed.is_initialized():
        return None
    return [distributed.new_group([rank]) for rank in range(number_of_processes())][own_rank()]
