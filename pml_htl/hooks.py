"""Keeping the tree current while the network trains (method, section 5)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ._pml import to_device
from .common.labels import Labels, integer_at_least, label_tensor
from .common.state import check_entries, check_setting
from .distributed import Group, Ranks
from .refreshing.embedding import (
    REFRESH,
    Sample,
    collect_statistics,
    embed_sample,
    inputs_and_labels,
    make_loader,
    share_of,
    subset_per_class,
)
from .refreshing.progress import with_progress
from .refreshing.streaming import LossWatch
from .refreshing.tensorboard import TensorBoard
from .refreshing.trainers import (
    check_watched,
    compare_classes,
    compare_labels,
    first_stream_and_labels,
    labels_of_samples,
    part_of_embedding,
    streams_and_labels,
    unwrapped,
    without_ddp,
)
from .samplers import AnchorNeighborSampler
from .tree import ClassStatistics, ClassTree

MODES = ("full", "streaming")
BATCH_SIZE = 256
BATCH_SIZES = {"cpu": 64}  # the activations of more do not stay in the cache


class TreeRefresh:
    """Fits the tree to the current embeddings of the training set; an `end_of_epoch_hook` of PML's trainers.

    Each refresh is one pass over `dataset` in eval mode without gradients, batch by batch into the class statistics, so
    that memory is O(C D). After a second it shows a bar on the first process, as PML's trainers and testers do;
    `TQDM_DISABLE=1` turns all of these off. Afterwards every module is in the mode it was in, all random states are what
    they were, and the trainer's next batch is drawn from the new tree if its sampler has it. If embedding or fitting fails
    the error goes on to the caller and the old tree stays.

    It embeds and labels samples the way the trainer does (collate function, getter, label mapping, hierarchy level). With
    `TwoStreamMetricLoss` both streams count; with `CascadedEmbeddings` the tree is that of the slice which its loss sees.
    In a trainer the first refresh compares the labels of sampler, tree, trainer and data set; in a plain loop each compares
    those of the data set with `labels`, if they are given.

    With `mode="streaming"` there is no such pass: the statistics are those of the training batches that `loss` is called
    with, with forgetting, since the network changes (see `forget`). A fit is then all that a refresh costs. These are
    embeddings under augmentation, with batch norm in training mode, by the network of several moments: spreads, and `d_0`,
    are well above those of a full pass. In 250 iterations on glyphs (one run) `d_0` was twice as large for the former and
    four times for both at `forget=0.5`, less with more forgetting. Distances between near classes grow as much, so that
    their difference to the spreads, which margins are made of, was that of a full pass: 0.27 and 0.26.
    A sample that is drawn again counts again. Classes that have not been in a batch yet wait (`ClassTree.waiting`): they
    have random neighbours and the initial margin, and join the tree at the next refresh after their first batch. If not even
    two classes have been seen, and one of them twice, the tree stays as it is, a warning says so once, and the refresh is
    made up for after the next epoch (with `every_n_iterations`, as soon as they have). Batches that are not finite are left
    out; sixteen in a row are an error.

    In a torch.distributed job every process must call the hook. Each embeds a part of `dataset` (with the model inside a
    `DistributedDataParallel`, so that nobody waits for another's batch), the sums are added up, and all end with the same
    tree, and shared time. What fails on one fails on all, and the old trees stay. With `mode="streaming"` the batches of all
    processes count, each forgetting by its own; those that all have seen, as under PML's
    `DistributedLossWrapper(efficient=False)`, count once. Models of FSDP or FSDP2 (`fully_shard`) need all processes in each
    forward pass, so that all make equally many: one without more batches repeats its last, which does not count again. With
    them an error in the forward pass itself is raised only where it is; the others wait until that process ends, or for the
    group's timeout.

    Args:
        tree: the tree that sampler and loss share.
        dataset: the training set under its evaluation transform, giving what the trainer's own data set gives; None with
            `mode="streaming"`, which needs none.
        warmup_epochs: train this many epochs with the constant initial margin before the first refresh; with 0 there is
            one before the first batch too, by `before_training`.
        every_n_epochs: how many epochs from one refresh to the next.
        every_n_iterations: instead, how many iterations from one to the next, also within an epoch; the trainer needs
            `end_of_iteration_hook=refresh.end_of_iteration_hook` too then.
        samples_per_class: embed at most so many samples of each class, others each time; default all.
        labels: (N,) of `dataset`, by which these are chosen; default those of the trainer's `AnchorNeighborSampler`. `HTL`
            gives its own.
        seed: of that choice.
        mode: "full", a pass over `dataset`, or "streaming".
        loss: with "streaming", the loss whose batches count: any module that is called with (embeddings, labels, ...), such
            as PML's losses. `HTL` gives its own. It is watched from now on by a torch forward pre-hook, as long as this
            refresh is there; calls in eval mode or without gradients do not count, nor do copies of the loss.
        forget: with "streaming", what older samples of a class weigh each time a batch has new ones of it, in (0, 1]: with
            0.5, the default, the last three such batches or so count.
        batch_size, num_workers: of the pass over `dataset`. `batch_size=None` takes 64 on a CPU, whose caches hold the
            activations then, and 256 elsewhere; `num_workers=None` takes the trainer's number.
        group: the processes of a torch.distributed job that share a refresh; default, all.
        tensorboard_writer: a `SummaryWriter` that gets a picture of each new tree, as "class_tree", and as text the pairs of
            classes that are told apart least, as "confusable_classes". Needs matplotlib.
        tensorboard_sample: with the writer, a data set like `dataset`, of validation say. The embeddings of at most 1,000 of
            its samples, always the same, go to TensorBoard's projector at each refresh. With `mode="streaming"` in a plain
            loop, `refresh` needs the model for it.
        then: another end-of-epoch hook to call after each epoch, such as the one that PML's `HookContainer` makes (which
            so saves the new tree). What it returns is passed on: `False` ends the training.
        then_each_iteration: another end-of-iteration hook, which `end_of_iteration_hook` calls after each iteration.

    Attributes:
        num_refreshes, seconds: how many there have been, and how long all of them took.

    Raises:
        ValueError: while refreshing, whatever `ClassStatistics.update` and `ClassTree.fit` raise; labels of data set,
            trainer, sampler and tree that differ; losses of several slices with one tree; `samples_per_class` without
            labels; a watched `loss` that the trainer does not call, or calls under several names. At once: an unknown
            `mode`, "streaming" without a loss or labels or with `samples_per_class`, `forget` outside (0, 1].
        TypeError: `tree` is no ClassTree, `dataset` no data set, `loss` no module, or a hook cannot be called.
        RuntimeError: while refreshing, another process has failed; names its rank and its error.
        ImportError: `tensorboard_writer` without matplotlib.
    """

    def __init__(
        self,
        tree: ClassTree,
        dataset: Dataset[Any] | None,
        *,
        warmup_epochs: int = 1,
        every_n_epochs: int = 1,
        every_n_iterations: int | None = None,
        samples_per_class: int | None = None,
        labels: Labels | None = None,
        seed: int = 0,
        mode: str = "full",
        loss: torch.nn.Module | None = None,
        forget: float = 0.5,
        batch_size: int | None = None,
        num_workers: int | None = None,
        group: Group | None = None,
        tensorboard_writer: Any = None,
        tensorboard_sample: Dataset[Any] | None = None,
        then: Callable[[Any], Any] | None = None,
        then_each_iteration: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(tree, ClassTree):
            raise TypeError(f"tree must be a ClassTree, but it is a {type(tree).__name__}")
        for name, hook in (("then", then), ("then_each_iteration", then_each_iteration)):
            if hook is not None and not callable(hook):
                raise TypeError(f"{name} must be a hook to call with the trainer, but it is {hook!r}")
        if every_n_iterations is not None and every_n_epochs != 1:
            raise ValueError("give every_n_epochs or every_n_iterations, not both")
        self.tree = tree
        self.dataset = dataset
        self.warmup_epochs = integer_at_least(0, "warmup_epochs", warmup_epochs)
        self.every_n_epochs = integer_at_least(1, "every_n_epochs", every_n_epochs)
        self.every_n_iterations = _optional_integer(1, "every_n_iterations", every_n_iterations)
        self.samples_per_class = _optional_integer(2, "samples_per_class", samples_per_class)  # one has no spread
        self.labels = None if labels is None else label_tensor(labels, "cpu").numpy().copy()
        if self.labels is not None and self.labels.ndim != 1:
            raise ValueError(f"labels must be of shape (N,), one per sample, but they are {self.labels.shape}")
        self.seed = integer_at_least(0, "seed", seed)
        self.batch_size = _optional_integer(1, "batch_size", batch_size)
        self.num_workers = _optional_integer(0, "num_workers", num_workers)
        self.group = group
        if tensorboard_sample is not None and tensorboard_writer is None:
            raise ValueError("tensorboard_sample goes to TensorBoard's projector: give a tensorboard_writer as well")
        self.tensorboard = None if tensorboard_writer is None else TensorBoard(tensorboard_writer, tensorboard_sample)
        self.watch = self._watch(mode, loss, forget)
        self.then = then
        self.then_each_iteration = then_each_iteration
        self.num_refreshes = 0
        self.seconds = 0.0
        self._iterations_seen = False
        self._has_warned = False
        self._is_overdue = False

    def __call__(self, trainer: Any) -> Any:
        """After an epoch of a PML trainer: refreshes if it is time to, then calls `then` and returns its verdict."""
        if self.every_n_iterations is not None and not self._iterations_seen:
            raise ValueError(
                "every_n_iterations needs the trainer's iterations: "
                "give the trainer end_of_iteration_hook=refresh.end_of_iteration_hook as well"
            )
        if self.every_n_iterations is None and self.is_due(trainer.epoch):
            self._refresh_in(trainer)
        return None if self.then is None else self.then(trainer)

    def end_of_iteration_hook(self, trainer: Any) -> None:
        """After an iteration of a PML trainer: refreshes if `every_n_iterations` says so, then `then_each_iteration`."""
        self._iterations_seen = True
        if self.every_n_iterations is not None:
            iterations_done = trainer.get_global_iteration() + 1  # PML counts from 0
            after_warmup = iterations_done - self.warmup_epochs * trainer.iterations_per_epoch
            is_time = after_warmup >= 0 and after_warmup % self.every_n_iterations == 0
            if is_time or self._is_overdue:
                self._refresh_in(trainer)
        if self.then_each_iteration is not None:
            self.then_each_iteration(trainer)

    def before_training(self, trainer: Any) -> None:
        """Before `trainer.train()`: refreshes if `warmup_epochs` is 0, for a network that is already trained.

        With `mode="streaming"` there is nothing to fit yet; it only checks that the trainer has the watched loss.
        """
        if self.watch is not None:  # nothing has been seen yet
            check_watched(trainer, self.watch.loss)
        elif self.warmup_epochs == 0:
            self._refresh_in(trainer)

    def is_due(self, num_epochs: int) -> bool:
        """Whether there is to be a refresh when `num_epochs` epochs are done, by `warmup_epochs` and `every_n_epochs`."""
        if self.watch is not None and num_epochs == 0:  # nothing has been seen yet
            return False
        after_warmup = num_epochs - self.warmup_epochs
        return self._is_overdue or (after_warmup >= 0 and after_warmup % self.every_n_epochs == 0)

    def refresh(
        self,
        model: torch.nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        data_and_label_getter: Callable[[Any], tuple[Any, Labels]] | None = None,
        collate_fn: Callable[..., Any] | None = None,
    ) -> None:
        """The same in a plain training loop.

        Args:
            model: from a batch of inputs to embeddings (B, D). With `mode="streaming"` no argument is needed or used.
            device: where inputs go; default, where the model's parameters are.
            dtype: what inputs are cast to, as a trainer's `dtype`; default, they are left as they are.
            data_and_label_getter: from a batch to (inputs, labels); default, a batch is such a pair.
            collate_fn: of the loader.
        """
        ranks, start = Ranks(self.group), time.perf_counter()
        if self.watch is None or (self.tensorboard is not None and self.tensorboard.sample is not None):
            with ranks.together(REFRESH):
                if model is None:
                    raise ValueError(
                        'refresh needs the model that embeds the data set, unless the refresh has mode="streaming" and no '
                        "tensorboard_sample"
                    )
                if not isinstance(model, torch.nn.Module):
                    raise TypeError(f"model must be a torch module that embeds a batch of inputs, but it is {model!r}")
                for name, function in (("data_and_label_getter", data_and_label_getter), ("collate_fn", collate_fn)):
                    if function is not None and not callable(function):
                        raise TypeError(f"{name} must be a function of a batch, but it is {function!r}")
                model = unwrapped(model)
                if device is None:
                    device = next((parameter.device for parameter in model.parameters()), None)
        device = "cpu" if device is None else device

        def batches(loader: Iterable[Any]) -> Iterator[tuple[Any, Labels]]:
            for batch in loader:
                pair = batch if data_and_label_getter is None else data_and_label_getter(batch)
                inputs, labels = inputs_and_labels(pair)
                yield to_device(inputs, device=device, dtype=dtype), labels

        if self.watch is not None:
            statistics = self._watched(self.watch, ranks)
            if statistics is None:
                return
        else:
            assert model is not None  # see above
            with ranks.together(REFRESH):
                loader = self._loader(device, self.num_workers or 0, collate_fn, ranks, known_labels=None)
            statistics = collect_statistics([model], model, batches(loader), ranks).all_reduce(self.group)
            with ranks.together(REFRESH):
                self._compare_given_labels(statistics)
        self._fit(statistics, device, ranks, start)

        def embed(sample: Dataset[Any]) -> Sample:
            assert model is not None  # see above
            return embed_sample([model], model, batches(make_loader(sample, self._batch_size(device), 0, collate_fn)))

        if self.tensorboard is not None:
            self.tensorboard.add(self.tree, self.num_refreshes - 1, ranks, embed)

    def state_dict(self) -> dict[str, Any]:
        """Counts, and with `mode="streaming"` the statistics of all batches so far. The tree has its own `state_dict`."""
        return {
            "num_refreshes": self.num_refreshes,
            "seconds": self.seconds,
            "iterations_seen": self._iterations_seen,
            "has_warned": self._has_warned,
            "is_overdue": self._is_overdue,
            "mode": MODES[self.watch is not None],
            "watch": None if self.watch is None else self.watch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was called.

        Raises:
            ValueError: it is not such a state, of another mode, or with "streaming" of other labels or another `forget`.
                Nothing has changed then.
        """
        names = ("num_refreshes", "seconds", "iterations_seen", "has_warned", "is_overdue", "mode", "watch")
        check_entries(state, names, type(self).__name__)
        check_setting("mode", state["mode"], MODES[self.watch is not None], type(self).__name__)
        num_refreshes = integer_at_least(0, "num_refreshes of the state", state["num_refreshes"])
        seconds = float(state["seconds"])
        if self.watch is not None:
            self.watch.load_state_dict(state["watch"])
        self.num_refreshes, self.seconds = num_refreshes, seconds
        self._iterations_seen, self._has_warned = bool(state["iterations_seen"]), bool(state["has_warned"])
        self._is_overdue = bool(state["is_overdue"])

    def _refresh_in(self, trainer: Any) -> None:
        ranks, start = Ranks(self.group), time.perf_counter()
        is_first, sampler = self.num_refreshes == 0, trainer.sampler
        with ranks.together(REFRESH):
            if is_first and self.watch is not None:
                check_watched(trainer, self.watch.loss)
            samples = labels_of_samples(trainer) if is_first else None
        step = trainer.get_global_iteration() + 1 if hasattr(trainer, "iteration") else 0
        statistics = self._embedded(trainer, ranks) if self.watch is None else self._watched(self.watch, ranks)
        if statistics is None:
            return
        with ranks.together(REFRESH):
            compare_labels(statistics.labels.cpu(), trainer, samples, self.tree if is_first else None)
        self._fit(statistics, trainer.data_device, ranks, start)
        if hasattr(trainer, "dataloader") and getattr(sampler, "tree", None) is self.tree:
            # Its iterator holds batches of the old tree, ready made by its workers, which end when it goes.
            trainer.dataloader_iter = anew(trainer.dataloader)

        def embed(sample: Dataset[Any]) -> Sample:
            loader = make_loader(sample, self._batch_size(trainer.data_device), 0, trainer.collate_fn)
            with without_ddp(trainer.models):
                models = list(trainer.models.values())
                return embed_sample(models, trainer.compute_embeddings, first_stream_and_labels(trainer, loader))

        if self.tensorboard is not None:
            self.tensorboard.add(self.tree, step, ranks, embed)

    def _embedded(self, trainer: Any, ranks: Ranks) -> ClassStatistics:
        """The statistics of the data set, embedded as the trainer does."""
        with without_ddp(trainer.models):
            with ranks.together(REFRESH):
                labels = trainer.sampler.labels if isinstance(trainer.sampler, AnchorNeighborSampler) else None
                num_workers = trainer.dataloader_num_workers if self.num_workers is None else self.num_workers
                loader = self._loader(trainer.data_device, num_workers, trainer.collate_fn, ranks, labels)
                part = part_of_embedding(trainer, self.tree)
            statistics = collect_statistics(
                list(trainer.models.values()),
                lambda data: trainer.compute_embeddings(data)[:, part],
                streams_and_labels(trainer, loader),
                ranks,
            )
        return statistics.all_reduce(self.group)

    def _watched(self, watch: LossWatch, ranks: Ranks) -> ClassStatistics | None:
        """The statistics of the batches watched; None, and the refresh is overdue, if they are not enough for a tree."""
        with ranks.together(REFRESH):
            watch.up_to_date()
        statistics = watch.of_all(ranks)
        num_seen = 0 if statistics is None else int((statistics.counts > 0).sum())
        self._is_overdue = statistics is None or num_seen < 2 or bool(statistics.average_spread.isnan())
        if self._is_overdue and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the tree stays as it is: the batches that the {type(watch.loss).__name__} has seen had "
                f"{num_seen} of {len(watch.labels)} classes, and a tree needs two, one of them with two "
                "samples; is this the loss that trains, in training mode and with gradients?",
                stacklevel=3,
            )
        return None if self._is_overdue else statistics

    def _fit(self, statistics: ClassStatistics, device: torch.device | str, ranks: Ranks, start: float) -> None:
        # Only the batches that a loss sees can lack classes: those of a data set have been compared.
        self.tree.fit(statistics, partial=self.watch is not None, device=device, ranks=ranks)
        self.tree.refresh_seconds = time.perf_counter() - start
        self.seconds += self.tree.refresh_seconds
        self.num_refreshes += 1

    def _watch(self, mode: str, loss: torch.nn.Module | None, forget: float) -> LossWatch | None:
        if mode not in MODES:
            raise ValueError(f"mode must be {' or '.join(MODES)}, but it is {mode!r}")
        if mode == "full":
            if self.dataset is None:
                raise ValueError('a refresh embeds the training set, but dataset is None; mode="streaming" needs none')
            if not hasattr(self.dataset, "__getitem__") and not isinstance(self.dataset, IterableDataset):
                raise TypeError(f"dataset must be a data set of torch, but it is {self.dataset!r}")
            if self.samples_per_class is not None and not hasattr(self.dataset, "__len__"):
                raise TypeError("samples_per_class chooses samples by their places, but the data set has no length")
            return None
        if loss is None or self.labels is None:
            raise ValueError(
                'mode="streaming" needs the loss whose batches count and the labels of the training set: give loss and '
                "labels, or make the hook by HTL.refresh_hook, which has both"
            )
        if not isinstance(loss, torch.nn.Module):
            raise TypeError(f"loss must be a module that is called with embeddings and labels, but it is {loss!r}")
        if self.samples_per_class is not None:
            raise ValueError('samples_per_class is of the pass over the data set, which mode="streaming" does without')
        return LossWatch(loss, torch.from_numpy(self.labels), forget)

    def _compare_given_labels(self, statistics: ClassStatistics) -> None:
        """In a plain loop: the labels given are all there is to compare with."""
        if self.labels is not None:
            advice = "give TreeRefresh the whole training set and its labels, or HTL the labels that the loop uses"
            compare_classes(statistics.labels.cpu(), torch.from_numpy(self.labels).unique(), "the refresh was given", advice)

    def _loader(
        self,
        device: torch.device | str,
        num_workers: int,
        collate_fn: Callable[..., Any] | None,
        ranks: Ranks,
        known_labels: np.ndarray | None,
    ) -> Iterable[Any]:
        dataset = self.dataset
        assert dataset is not None  # only a streaming refresh goes without
        if self.samples_per_class is not None:
            assert hasattr(dataset, "__len__")  # `_watch` has refused others
            labels = known_labels if self.labels is None else self.labels
            if labels is None or len(labels) != len(dataset):
                given = "none were given" if labels is None else f"there are {len(labels)}"
                raise ValueError(
                    f"samples_per_class needs the labels of the {len(dataset)} samples of the data set, but {given}; "
                    "see the argument labels"
                )
            generator = np.random.default_rng([self.seed, self.num_refreshes])
            dataset = subset_per_class(dataset, labels, self.samples_per_class, generator)
        if ranks.size > 1:
            dataset = share_of(dataset, ranks)
        return with_progress(make_loader(dataset, self._batch_size(device), num_workers, collate_fn), ranks)

    def _batch_size(self, device: torch.device | str) -> int:
        known = BATCH_SIZES.get(torch.device(device).type, BATCH_SIZE)
        return known if self.batch_size is None else self.batch_size


def anew(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader from its beginning; its workers start with the first of them, not before."""
    yield from loader


def _optional_integer(minimum: int, name: str, value: Any) -> int | None:
    return None if value is None else integer_at_least(minimum, name, value)
