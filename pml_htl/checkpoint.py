"""Stopping and going on: the whole state of a training in one file, which is there as a whole or not at all."""

from __future__ import annotations

import copy
import os
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._pml import MPerClassSampler
from .common.state import check_entries
from .hooks import TreeRefresh, anew
from .samplers import AnchorNeighborSampler

FORMAT = "pml-htl checkpoint 1"
RANDOM_STATES = "random states"  # no keyword, so that no part given can have this name


class Checkpoint:
    """Saves the states of named parts with those of all global random generators, and restores them.

    A training that is killed at any moment, started again and restored ends with the same model as one that was not, as far
    as the device computes the same numbers twice. For a trainer of PML see `CheckpointHook`.

    The file is written beside its place, flushed to the disk, read back, and moved over the old one, so that one of the two
    is there whole whenever the process dies. It is a file of `torch.save` that loads with `weights_only=True`. Random states
    are those of Python, NumPy and torch, on the CPU and on all CUDA devices.

    Args:
        path: of the file; its folder is made when it is needed. One process writes to it.
        **parts: all that changes in training, under names of your choice: what has `state_dict` and `load_state_dict`
            (models, optimizers, schedulers, scalers, a loss with its tree, `AnchorNeighborSampler`, `TreeRefresh`, ...), a
            `torch.Generator`, or PML's `MPerClassSampler`.

    Raises:
        TypeError: a part is none of these.

    Example: a plain loop that may be killed anywhere; started again, it goes on after the last `save`, here at most three
    steps ago. The loader has a generator of its own because `iter(loader)` draws a number, which in the middle of an epoch
    would be one too many from the global generator.

        >>> import tempfile
        >>> from pathlib import Path
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from pml_htl import HTL
        >>> from pml_htl.checkpoint import Checkpoint
        >>> labels = torch.arange(12).repeat_interleave(6)
        >>> dataset = TensorDataset(torch.randn(72, 8, generator=torch.Generator().manual_seed(0)), labels)
        >>> def train(path, steps):
        ...     torch.manual_seed(0)
        ...     model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 4))
        ...     optimizer = torch.optim.Adam(model.parameters())
        ...     htl = HTL(labels, num_anchors=2, neighborhood_size=3, samples_per_class=2, seed=0)
        ...     refresh = htl.refresh_hook(dataset)
        ...     loader = DataLoader(dataset, batch_sampler=htl.sampler, generator=torch.Generator())
        ...     parts = {"loss": htl.loss, "sampler": htl.sampler, "refresh": refresh}
        ...     checkpoint = Checkpoint(path, model=model, optimizer=optimizer, **parts)
        ...     step = (checkpoint.load() or {"step": 0})["step"]
        ...     while step < steps:
        ...         for x, y in loader:  # after a resumption, the rest of the epoch
        ...             optimizer.zero_grad()
        ...             htl.loss(model(x), y).backward()
        ...             optimizer.step()
        ...             step += 1
        ...             if step % len(loader) == 0:
        ...                 refresh.refresh(model)
        ...             if step % 3 == 0:
        ...                 checkpoint.save(step=step)
        ...             if step == steps:
        ...                 break
        ...     return model[0].weight
        >>> folder = Path(tempfile.mkdtemp())
        >>> expected = train(folder / "one.pt", steps=20)
        >>> _ = train(folder / "two.pt", steps=11)  # "killed" after 11, goes on from 9
        >>> torch.equal(train(folder / "two.pt", steps=20), expected)
        True

    With loader workers, which draw batches ahead, `save` must be told how many of them were consumed. What the workers
    themselves draw at random (augmentations) is not reproduced in the middle of an epoch, as their seeds are new then.
    """

    def __init__(self, path: str | Path, **parts: Any) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._parts = {**{name: _with_state(name, part) for name, part in parts.items()}, RANDOM_STATES: _RandomStates()}
        self._kinds = {name: type(part).__name__ for name, part in parts.items()}

    def save(self, *, batches_consumed: int | None = None, **progress: Any) -> None:
        """Writes the file; if that fails, an older one stays as it is.

        Args:
            batches_consumed: of the sampler's current epoch, those before a resumption counted; see
                `AnchorNeighborSampler.state_dict`. Default: all that it has drawn, which is right without loader workers.
            **progress: numbers, words and the like, which `load` returns: epoch, step, ...

        Raises:
            ValueError: a state or `progress` holds something that `torch.load(weights_only=True)` does not read (a NumPy
                number, say), `batches_consumed` without an `AnchorNeighborSampler`; and what `state_dict` of a part raises.
        """
        samplers = [name for name, part in self._parts.items() if isinstance(part, AnchorNeighborSampler)]
        if batches_consumed is not None and not samplers:
            raise ValueError("batches_consumed is of an AnchorNeighborSampler, but none is among the parts")
        states = {
            name: part.state_dict(batches_consumed) if name in samplers else part.state_dict()
            for name, part in self._parts.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._partial.open("wb") as file:
                torch.save({"format": FORMAT, "kinds": self._kinds, "progress": progress, "states": states}, file)
                file.flush()
                os.fsync(file.fileno())
            _read(self._partial)  # what cannot be read must not take the place of what can
            os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)
        if os.name == "posix":  # a folder keeps the new name only when it is written itself
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def load(self) -> dict[str, Any] | None:
        """Restores everything, and returns the `progress` that was saved; None if there is no file.

        Call it when all parts are made, just before the training goes on. What a killed process has left half-written is
        removed.

        Raises:
            ValueError: the file is not whole or no checkpoint, has other parts, or some part refuses its state. All parts,
                and the random states, are then as they were.
        """
        self._partial.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        document = _read(self.path)
        if document["kinds"] != self._kinds:
            saved, own = document["kinds"].items(), self._kinds.items()
            raise ValueError(
                f"{self.path} is of other parts: only the file has {_named(saved - own)}, and only this checkpoint has "
                f"{_named(own - saved)}; make the same parts, or remove the file to begin anew"
            )
        before: dict[str, Any] = {}
        for name, part in self._parts.items():
            before[name] = copy.deepcopy(part.state_dict())
            try:
                part.load_state_dict(document["states"][name])
            except Exception as error:
                for changed, state in before.items():
                    self._parts[changed].load_state_dict(state)
                raise ValueError(f"{name} does not take its state from {self.path}: {error}") from error
        return document["progress"]


class CheckpointHook:
    """An `end_of_epoch_hook` of PML's trainers that saves a `Checkpoint` after each epoch, and resumes from it.

    It saves models, optimizers, learning-rate schedulers, losses (with their trees), miners, the sampler, and each
    `TreeRefresh` that it calls. After saving, it starts the trainer's data anew, as a resumption does, so that both go on
    with the same batches. So a training with this hook ends with the same model however often it was killed (with the same
    number of loader workers), but not with that of a training without this hook.

    Args:
        path: of the file.
        then: the end-of-epoch hook to call first, such as a `TreeRefresh` or the one that PML's `HookContainer` makes. What
            it returns is passed on: `False` ends the training.
        **parts: more parts with a state, see `Checkpoint`, such as a generator of augmentations, or a `TreeRefresh` that
            `then` calls in a hook of your own.

    Of PML's and torch's samplers, those that draw from global generators and `MPerClassSampler` are gone on with exactly.
    What hooks outside this one draw at random after it is not.

    Raises:
        TypeError: `then` cannot be called, or a part has no state.

    Example:
        hook = CheckpointHook("run/checkpoint.pt", then=htl.refresh_hook(dataset, then=save_and_test))
        trainer = MetricLossOnly(..., end_of_epoch_hook=hook)
        trainer.train(start_epoch=hook.resume(trainer), num_epochs=20)
    """

    def __init__(self, path: str | Path, then: Callable[[Any], Any] | None = None, **parts: Any) -> None:
        if then is not None and not callable(then):
            raise TypeError(f"then must be a hook to call with the trainer, but it is {then!r}")
        self.path = Path(path)
        self.then = then
        self._own_parts = dict(parts)
        while isinstance(then, TreeRefresh):
            if all(part is not then for part in parts.values()):
                self._own_parts[f"then.{len(self._own_parts)}"] = then
            then = then.then
        Checkpoint(path, **self._own_parts)  # what is wrong with them shows now

    def __call__(self, trainer: Any) -> Any:
        """After an epoch: calls `then`, saves, and returns the verdict of `then`. Raises what `Checkpoint.save` does."""
        verdict = None if self.then is None else self.then(trainer)
        self._checkpoint(trainer).save(epoch=trainer.epoch, has_ended=verdict is False)
        # As after a resumption: a sampler of ours yields the rest of its epoch, and the loader draws a new seed.
        if isinstance(trainer.sampler, AnchorNeighborSampler):
            trainer.sampler.load_state_dict(trainer.sampler.state_dict())
        trainer.dataloader_iter = anew(trainer.dataloader)
        return verdict

    def resume(self, trainer: Any) -> int:
        """Restores the last epoch saved, and returns the epoch to start with, for `trainer.train(start_epoch=...)`.

        That is 1 if there is no file (and then a `TreeRefresh` with `warmup_epochs=0` is to be called `before_training`).
        It is beyond all epochs if `then` had ended the training. Call it just before `trainer.train`: what draws random
        numbers in between changes the training.

        Raises:
            ValueError: see `Checkpoint.load`.
        """
        progress = self._checkpoint(trainer).load()
        if progress is None:
            return 1
        trainer.epoch = progress["epoch"]
        return sys.maxsize if progress["has_ended"] else trainer.epoch + 1

    def _checkpoint(self, trainer: Any) -> Checkpoint:
        parts = dict(self._own_parts)
        for kind in ("models", "optimizers", "lr_schedulers", "loss_funcs", "mining_funcs"):
            parts.update({f"{kind}.{name}": part for name, part in getattr(trainer, kind).items()})
        if _has_state(trainer.sampler):
            parts["sampler"] = trainer.sampler
        return Checkpoint(self.path, **parts)


def _read(path: Path) -> dict[str, Any]:
    """The document of a file, on the CPU; a `ValueError` if it is not whole or none of ours."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the check sums
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the check sum of {damaged} is wrong")
        document = torch.load(path, map_location="cpu", weights_only=True)
        check_entries(document, ("format", "kinds", "progress", "states"), "checkpoint")
        if document["format"] != FORMAT or not isinstance(document["kinds"], dict):
            raise ValueError(f"its format is {document['format']!r}, and this version of pml-htl reads {FORMAT!r}")
        check_entries(document["states"], [*document["kinds"], RANDOM_STATES], "checkpoint of these parts")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint that can be read: {error}") from error
    return document


def _named(kinds: set[tuple[str, str]]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds)) or "nothing"


def _has_state(part: Any) -> bool:
    stateful = hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    return stateful or isinstance(part, (torch.Generator, MPerClassSampler))


def _with_state(name: str, part: Any) -> Any:
    """The part, or what gives it a `state_dict`."""
    if not _has_state(part):
        raise TypeError(f"{name} has no state_dict and load_state_dict to save and restore it by: {part!r}")
    if isinstance(part, torch.Generator):
        return _Generator(part)
    return _ClassOrder(part) if isinstance(part, MPerClassSampler) else part


class _Generator:
    """torch's generators have states, but under other names."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        """As in torch."""
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As in torch."""
        self.generator.set_state(state["state"])


class _ClassOrder:
    """PML's sampler shuffles its classes in place, so their order is a state beside NumPy's."""

    def __init__(self, sampler: MPerClassSampler) -> None:
        self.sampler = sampler

    def state_dict(self) -> dict[str, Any]:
        """As in torch."""
        return {"labels": torch.tensor([int(label) for label in self.sampler.labels])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As in torch."""
        labels = state["labels"].tolist()
        if sorted(labels) != sorted(self.sampler.labels):
            raise ValueError("the state is of an MPerClassSampler with other labels")
        self.sampler.labels[:] = labels


class _RandomStates:
    """The global generators of Python, NumPy and torch."""

    def state_dict(self) -> dict[str, Any]:
        """As in torch."""
        numpy_state = np.random.get_state(legacy=False)
        key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
        return {
            "python": random.getstate(),
            "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As in torch."""
        check_entries(state, ("python", "numpy", "torch", "cuda"), "random generator")
        numpy_state = state["numpy"]
        key = numpy_state["state"]["key"].numpy().astype(np.uint32)
        random.setstate(state["python"])
        np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
        torch.set_rng_state(state["torch"])
        for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda_state, device)
