"""One training: a method and a seed, through PML's trainer, tester, hook container and record-keeper."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.logging_presets import HookContainer, get_hook_container, get_record_keeper

from pml_htl import ClassTree, TreeRefresh
from pml_htl.checkpoint import CheckpointHook
from pml_htl.refreshing.trainers import without_ddp

from ..common.progress import News
from ..common.ranks import is_first, number_of_processes, own_rank, shared_loss, shared_miner, shared_model, wait_for_all
from ..data import Splits
from ..methods.contenders import Contender
from ..methods.method import Task
from .evaluation import BATCH_SIZE, PRIMARY_METRIC, accuracies_of, make_tester, save_embeddings, test_splits
from .nearness import NearnessOfRefreshes
from .networks import make_network
from .reporting import Reporter
from .resuming import MadeWith, RunFiles, checkpoint_of, made_with

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Plan:
    """How all contenders are trained."""

    iterations: int = 2000
    epoch_iterations: int = 100  # an evaluation on the validation classes, and a refresh of the tree, after so many
    batch_size: int = 128
    embedding_size: int = 128
    device: str = "cpu"
    workers: int = 0
    precision: str = "fp32"  # of the network; losses and trees compute in float32 and float64 in any case
    network: str = "strided_net"
    weights: str = "random"  # or "pretrained", or a file
    freeze_batch_norm: bool = False
    image_size: int | None = None  # of data sets in files
    classes: int | None = None  # to train on; default all
    samples_per_class: int | None = None  # at most so many training images; default all
    split_classes: float = 0.0  # share of the training classes that are two, by mistake
    wrong_labels: float = 0.0  # share of the training images that have the label of another class
    schedule: str = "cosine"  # of the learning rate, falls to zero; or "constant"

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):  # fp16 would need a gradient scaler, which PML's trainers lack
            raise ValueError(f"precision must be fp32 or bf16, but it is {self.precision!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be {' or '.join(SCHEDULES)}, but it is {self.schedule!r}")
        for name in ("split_classes", "wrong_labels"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of 0 to 1, but it is {getattr(self, name)}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"there is no device {self.device!r} here: {str(error).splitlines()[0]}") from error
        if self.iterations % self.epoch_iterations:
            raise ValueError(
                f"the iterations must be a multiple of the {self.epoch_iterations} of an epoch, not {self.iterations}; "
                "see --epoch-iterations"
            )

    @property
    def num_epochs(self) -> int:
        return self.iterations // self.epoch_iterations

    def task(self, data: Splits, seed: int) -> Task:
        """What a method is given to make its parts."""
        return Task(data.train.labels, self.batch_size, self.embedding_size, self.epoch_iterations, seed)

    def comparable(self) -> dict[str, int | str]:
        """What all runs of a results file share, as far as it is set; device and workers may change between sessions."""
        settings = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("device", "workers") and value is not None and value is not False and value != 0.0
        }
        # Batch norm sees the samples of one process, so their number matters.
        return settings if number_of_processes() == 1 else {**settings, "processes": number_of_processes()}


@dataclass(frozen=True)
class Outcome:
    """What came of a training: accuracies by split and metric, the validation curve, seconds, and the tree.

    The tree is that of the best epoch where the loss holds it, else the last one.
    """

    accuracies: dict[str, dict[str, Any]]  # "validation" and "test" -> metric -> 0 .. 1, and "recall" -> K -> 0 .. 1
    curve: list[tuple[int, float, float]]  # iterations, validation MAP@R, seconds of training and refreshing until then
    train_seconds: float
    refresh_seconds: float
    tree: ClassTree | None
    nearness: dict[str, Any] = field(default_factory=dict)  # at refreshes, see training/nearness.py


class Stopwatch:
    """Times the training alone: it stands still during the end-of-epoch hooks, and goes on after a resumption.

    It also keeps the seconds of refreshing until the end of each epoch, which the hooks add.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.seconds_by_epoch: list[float] = []
        self.refresh_seconds_by_epoch: list[float] = []
        self._start = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        vars(self).update(state)
        self._start = time.perf_counter()

    def pausing(self, hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def paused(trainer: Any) -> Any:
            self.seconds += time.perf_counter() - self._start
            self.seconds_by_epoch.append(self.seconds)
            verdict = hook(trainer)
            self._start = time.perf_counter()
            return verdict

        return paused


class InPrecision(torch.nn.Module):
    """A network that computes in a shorter float type; its output is float32."""

    def __init__(self, network: torch.nn.Module, precision: str) -> None:
        super().__init__()
        self.network = network
        self.precision = precision

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """As the network."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.network(inputs).float()


def train(
    contender: Contender,
    seed: int,
    plan: Plan,
    data: Splits,
    folder: Path,
    *,
    test: bool = True,
    keep_embeddings: bool = False,
    tell: Callable[[News], None] = lambda news: None,
) -> Outcome | None:
    """Trains on `data.train`, chooses the epoch on `data.val`, and tests it on `data.test` unless told not to.

    Records, TensorBoard files and models go to `folder`, which is emptied first, unless there is a checkpoint of this very
    training, which is then gone on with. The same seed gives the same outcome, also of a training that was killed.
    With `keep_embeddings` those of the test are there as well, see `evaluation.save_embeddings`. `tell` hears how far it is.

    Under torchrun all processes train one model (without checkpoints), and the first tests it; for the others, None.
    """
    first = is_first()
    if first and not checkpoint_of(folder).exists():
        shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    np.random.seed(seed if first else [seed, own_rank()])  # MPerClassSampler draws from NumPy's global generator
    device = torch.device(plan.device)
    parts = contender.build(plan.task(data, seed))
    loss = parts.loss.to(device)
    trunk, width = make_network(plan.network, data.train.channels, seed, plan.weights)
    trunk = InPrecision(trunk.to(device), plan.precision)
    embedder = InPrecision(torch.nn.Linear(width, plan.embedding_size).to(device), plan.precision)

    stopwatch, nearness = Stopwatch(), NearnessOfRefreshes(data.twins)
    stateful: dict[str, Any] = {
        "made_with": MadeWith(made_with(contender, seed, asdict(plan), data)),
        "stopwatch": stopwatch,
        "nearness": nearness,
        "files": RunFiles(folder),
    }
    refresh = None
    if parts.tree is not None:
        streaming: dict[str, Any] = {} if parts.forget is None else {"mode": "streaming", "forget": parts.forget}
        refresh = TreeRefresh(
            parts.tree,
            data.train.evaluation(),
            warmup_epochs=parts.warmup_epochs,
            every_n_epochs=parts.refresh_every,
            **streaming,
            labels=data.train.labels,
            loss=loss,
            batch_size=BATCH_SIZE,
            num_workers=plan.workers,
        )
        stateful["refresh"] = refresh
    hooks: Any = None  # PML's, which have no types; of the first process alone, as is the tester
    test_and_save = None
    reporter = Reporter(title_with_seed(contender, seed), tell)
    if first:
        hooks = make_hooks(folder)
        tester = make_tester(hooks, data, plan.workers, device)
        test_and_save = hooks.end_of_epoch_hook(tester, {"val": data.val}, str(folder / "models"))

    def end_of_epoch(trainer: Any) -> None:
        if refresh is not None:
            refresh(trainer)
            if refresh.tree.is_fitted and refresh.tree.linkage == "single":
                nearness.add(refresh.tree, trainer.epoch * plan.epoch_iterations)
        stopwatch.refresh_seconds_by_epoch.append(0.0 if refresh is None else refresh.seconds)
        if test_and_save is not None:
            with without_ddp(trainer.models), without_ddp(trainer.loss_funcs):
                test_and_save(trainer)
            reporter.evaluated(trainer, hooks.get_best_epoch_and_accuracy(tester, "val")[1])
        wait_for_all()

    checkpoint = None
    if number_of_processes() == 1:
        checkpoint = CheckpointHook(checkpoint_of(folder), end_of_epoch, **stateful)
    optimizers = make_optimizers(trunk, embedder, loss, contender.settings["learning_rate"], parts.loss_lr)
    trainer = MetricLossOnly(
        models={"trunk": shared_model(trunk), "embedder": shared_model(embedder)},
        optimizers=optimizers,
        lr_schedulers=make_schedulers(optimizers, plan),
        batch_size=plan.batch_size // number_of_processes(),
        loss_funcs={"metric_loss": shared_loss(loss)},
        mining_funcs={} if parts.miner is None else {"tuple_miner": shared_miner(parts.miner)},
        dataset=data.train,
        sampler=parts.sampler,
        iterations_per_epoch=plan.epoch_iterations,
        data_device=device,
        dataloader_num_workers=plan.workers,
        freeze_trunk_batchnorm=plan.freeze_batch_norm,
        end_of_iteration_hook=one_after_another(hooks.end_of_iteration_hook, reporter.end_of_iteration) if first else None,
        end_of_epoch_hook=stopwatch.pausing(end_of_epoch if checkpoint is None else checkpoint),
    )
    start_epoch = 1
    try:
        if checkpoint is not None:
            start_epoch = checkpoint.resume(trainer)
    except ValueError as error:  # of other settings or other code, or damaged
        warnings.warn(f"{error}. This training begins anew", stacklevel=2)
        close_records(hooks)
        shutil.rmtree(folder)
        return train(contender, seed, plan, data, folder, test=test, keep_embeddings=keep_embeddings, tell=tell)
    trainer.train(start_epoch, plan.num_epochs)
    if not first:
        return None

    tester.reference_split_names["val"] = ["val"]  # PML knows only after a test, which a resumed training may not need
    history = hooks.get_accuracy_history(tester, "val", return_all_metrics=True)
    best_epoch, _ = hooks.get_best_epoch_and_accuracy(tester, "val")
    validation = accuracies_of({name: values[best_epoch - 1] for name, values in history.items()})
    with without_ddp(trainer.models), without_ddp(trainer.loss_funcs):  # the tree comes along
        # By way of the host: the tree has float64, and torch loads none onto a device that has none.
        hooks.load_latest_saved_models(trainer, str(folder / "models"), torch.device("cpu"), best=True)
    accuracies = {"validation": validation}
    if test:
        images, looked_up_in = test_splits(data)
        if keep_embeddings:
            tester.end_of_testing_hook = one_after_another(
                tester.end_of_testing_hook, partial(save_embeddings, folder=folder)
            )
        found = tester.test(images, best_epoch, trunk, embedder, splits_to_eval=looked_up_in)["test"]
        accuracies["test"] = accuracies_of(found)
    close_records(hooks)
    return Outcome(
        accuracies,
        curve=[
            (epoch * plan.epoch_iterations, accuracy, trained + refreshed)
            for epoch, accuracy, trained, refreshed in zip(
                history["epoch"],
                history[f"{PRIMARY_METRIC}_level0"],
                stopwatch.seconds_by_epoch,
                stopwatch.refresh_seconds_by_epoch,
                strict=True,
            )
        ],
        train_seconds=stopwatch.seconds,
        refresh_seconds=stopwatch.refresh_seconds_by_epoch[-1],
        tree=parts.tree,
        nearness=nearness.found,
    )


def title_with_seed(contender: Contender, seed: int) -> str:
    """How a training is called."""
    return f"{contender.title}, seed {seed}"


def one_after_another(*hooks: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook that calls these."""

    def all_of_them(caller: Any) -> None:
        for hook in hooks:
            hook(caller)

    return all_of_them


def make_hooks(folder: Path) -> HookContainer:
    """PML's hook container with its records in `folder`."""
    record_keeper, _, _ = get_record_keeper(str(folder / "records"), str(folder / "tensorboard"))
    return get_hook_container(record_keeper, primary_metric=PRIMARY_METRIC, log_freq=10)


def make_optimizers(
    trunk: torch.nn.Module, embedder: torch.nn.Module, loss: torch.nn.Module, learning_rate: float, loss_lr: float | None
) -> dict[str, torch.optim.Optimizer]:
    """Adam for everything that learns; the parameters of a loss (proxies) have a learning rate of their own."""
    parameters = {"trunk": (trunk, learning_rate), "embedder": (embedder, learning_rate)}
    if loss_lr is not None:
        parameters["metric_loss"] = (loss, loss_lr)
    return {
        f"{name}_optimizer": torch.optim.Adam(module.parameters(), rate, fused=True)
        for name, (module, rate) in parameters.items()
    }


def make_schedulers(
    optimizers: dict[str, torch.optim.Optimizer], plan: Plan
) -> dict[str, torch.optim.lr_scheduler.LRScheduler]:
    """By the names that PML's trainers step after each iteration."""
    if plan.schedule == "constant":
        return {}
    return {
        name.removesuffix("_optimizer") + "_scheduler_by_iteration": torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, plan.iterations
        )
        for name, optimizer in optimizers.items()
    }


def close_records(hooks: HookContainer) -> None:
    hooks.record_keeper.save_records()
    hooks.record_keeper.tensorboard_writer.close()
