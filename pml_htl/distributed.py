"""The processes of a torch.distributed job: who is there, and what they do together. One process alone is a job too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

Group = Any  # a torch.distributed.ProcessGroup; torch has that name only where it was built with distributed

MAX_BYTES = 2**26  # of a tensor that goes to another device for a collective


def is_distributed() -> bool:
    """Whether this process is one of a torch.distributed job."""
    return distributed.is_available() and distributed.is_initialized()


class Ranks:
    """The processes of a group; all of them must call each method in the same order.

    Args:
        group: default, all processes of the job. Without a job there is this one, and every method returns at once.

    Attributes:
        size, rank: how many there are, and which of them this is. (With `alone`, 1 and 0.)
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group
        self.size = distributed.get_world_size(group) if is_distributed() else 1
        self.rank = distributed.get_rank(group) if is_distributed() else 0

    @classmethod
    def alone(cls) -> Ranks:
        """This process, whatever job it is in."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.size, ranks.rank = None, 1, 0
        return ranks

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block of work without collectives that fails everywhere if it fails anywhere, so that nobody waits for a process
        that is gone on with something else.

        Raises:
            RuntimeError: where it did not fail itself; names the rank and its error. `what` says what did not work.
        """
        own: BaseException | None = None
        try:
            yield
        except BaseException as error:  # Ctrl-C too: the others must not wait
            own = error
        reports = self.gather(None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        for rank, report in enumerate(reports):
            if report is not None:
                raise RuntimeError(f"{what} failed on rank {rank} of {self.size}: {report}")

    def gather(self, value: Any) -> list[Any]:
        """The value (small, picklable) of every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def sum_(self, tensor: torch.Tensor) -> None:
        """Adds up a tensor over all ranks, in place; of the same shape and type everywhere."""
        if self.size > 1:
            for part, own in self._parts(tensor):
                distributed.all_reduce(part, group=self.group)
                own.copy_(part)

    def union(self, labels: torch.Tensor) -> torch.Tensor:
        """The distinct labels that any rank has, sorted: from (C,) int64 of each; O(C) memory."""
        if self.size == 1:
            return labels.unique()
        found = labels.cpu().unique()
        for source in range(self.size):
            own = {"labels": labels.cpu()} if source == self.rank else None
            found = torch.cat([found, self.broadcast(own, source)["labels"]]).unique()
        return found.to(labels.device)

    def broadcast(self, tensors: dict[str, torch.Tensor] | None, source: int = 0) -> dict[str, torch.Tensor]:
        """Named tensors of rank `source` for all, on the CPU; the others give None."""
        if self.size == 1:
            if tensors is None:
                raise ValueError("one process alone is the source of what it broadcasts, but it gave None")
            return tensors
        kinds = None if tensors is None else {name: (value.shape, value.dtype) for name, value in tensors.items()}
        sent: list[Any] = [kinds]
        distributed.broadcast_object_list(sent, src=self._global(source), group=self.group)
        found = {}
        for name, (shape, dtype) in sent[0].items():
            value = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name].cpu().clone()
            for part, own in self._parts(value):
                distributed.broadcast(part, src=self._global(source), group=self.group)
                own.copy_(part)
            found[name] = value
        return found

    def concatenate(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The rows of all ranks one after another on rank 0, on the CPU; None on the others. All but the rows must agree."""
        lengths = self.gather(len(rows))
        found = []
        for rank, length in enumerate(lengths):  # one after another, so that memory is that of the result
            if self.rank not in (0, rank):
                continue
            if rank == 0:
                found.append(rows.cpu())
                continue
            part = rows.cpu() if rank == self.rank else torch.empty(length, *rows.shape[1:], dtype=rows.dtype)
            for sent, own in self._parts(part):
                if rank == self.rank:
                    distributed.send(sent, self._global(0), group=self.group)
                else:
                    distributed.recv(sent, self._global(rank), group=self.group)
                    own.copy_(sent)
            found.append(part)
        return torch.cat(found) if self.rank == 0 else None

    def share_of(self, number: int) -> slice:
        """The part of `number` things in a row that is this rank's."""
        return slice(self.rank * number // self.size, (self.rank + 1) * number // self.size)

    def _global(self, rank: int) -> int:
        """The rank in the whole job, by which torch names sources."""
        return rank if self.group is None else distributed.get_global_rank(self.group, rank)

    def _parts(self, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Parts of a tensor where the group can work on them (NCCL only on its GPU), each with its place in the tensor."""
        device = torch.device("cpu")
        if distributed.get_backend(self.group) == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        flat = tensor.view(-1)
        for own in flat.split(max(1, MAX_BYTES // tensor.element_size())):
            yield own.to(device), own
