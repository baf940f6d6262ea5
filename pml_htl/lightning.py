"""Keeping the tree current in a Lightning fit. Needs Lightning: `pip install "pml-htl[lightning]"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from .common.labels import Labels
from .hooks import TreeRefresh
from .samplers import AnchorNeighborSampler

if TYPE_CHECKING:  # the two names are of two packages with the same classes; a type checker needs one of them
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:
        try:
            from pytorch_lightning import Callback, LightningModule, Trainer
        except ImportError as error:
            raise ImportError('pml_htl.lightning needs Lightning: pip install "pml-htl[lightning]"') from error


class TreeRefreshCallback(Callback):
    """Refreshes the tree at the ends of epochs of a Lightning fit, and tells the sampler which epoch begins.

    The refresh embeds its data set with the module's `forward`, in eval mode, on the module's device and in the trainer's
    precision, in every process. It comes before any checkpoint of the epoch's end is written, so that this holds the new
    tree. `warmup_epochs=0` refreshes before the first batch too. No batch of the old tree follows a refresh.

    Before each epoch it calls `sampler.set_epoch`, since Lightning does so for samplers but not for batch samplers.

    Checkpoints hold the seed of the sampler, the numbers of epochs, batches and refreshes, and the tree: in the state of the
    module, if the loss or the tree is one of its attributes, else in the state of the callback. So a fit that goes on from
    one (`ckpt_path=`), also in the middle of an epoch, has the same tree and draws the same batches, whatever seed its
    sampler was made with. A checkpoint that is written while the epoch is validated holds the tree that the epoch was
    trained with; the fit that goes on from it begins with the refresh. What a streaming refresh has seen is not kept: it
    goes on with the tree, and sees all classes anew.

    Args:
        refresh: as `HTL.refresh_hook` makes it.
        sampler: the `AnchorNeighborSampler` that is the `batch_sampler` of the training loader; None if that has another.
        data_and_label_getter: from a batch of the refresh's data set to (inputs, labels); default, a batch is such a pair.
        collate_fn: of the loader over that data set.

    Raises:
        ValueError: a refresh with `every_n_iterations`, since Lightning's loader cannot be started anew within an epoch,
            or with hooks of PML's trainers; another tree in the sampler. When a fit begins: several processes without
            `Trainer(use_distributed_sampler=False)`, or a training loader that does not have the sampler. In an epoch's
            end: whatever `TreeRefresh.refresh` raises; the old tree stays.
        TypeError: `refresh` or `sampler` is something else.

    Example:
        >>> import torch
        >>> from pml_htl import HTL
        >>> from pml_htl.lightning import TreeRefreshCallback
        >>> labels = torch.arange(20).repeat_interleave(8)
        >>> dataset = torch.utils.data.TensorDataset(torch.randn(160, 8), labels)
        >>> htl = HTL(labels, num_anchors=2, neighborhood_size=3, samples_per_class=4)
        >>> callback = TreeRefreshCallback(htl.refresh_hook(dataset), htl.sampler)  # to Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        refresh: TreeRefresh,
        sampler: AnchorNeighborSampler | None = None,
        *,
        data_and_label_getter: Callable[[Any], tuple[Any, Labels]] | None = None,
        collate_fn: Callable[..., Any] | None = None,
    ) -> None:
        _check(refresh, sampler)
        self.refresh = refresh
        self.sampler = sampler
        self.data_and_label_getter = data_and_label_getter
        self.collate_fn = collate_fn
        # Counted here, since Lightning counts an epoch twice when it goes on from some of its checkpoints.
        self._num_epochs = 0  # that are done
        self._num_batches = 0  # of the epoch under way
        self._asked_after = -1  # how many epochs were done when the refresh was last asked whether it is due
        self._module_has_tree = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins to count, unless the trainer goes on with an earlier fit; a checkpoint is loaded after this."""
        if stage != "fit":
            return
        if self.sampler is not None and trainer.world_size > 1 and _replaces_samplers(trainer):
            raise ValueError(
                f"Lightning would replace the batch sampler in each of the {trainer.world_size} processes; "
                "give it Trainer(..., use_distributed_sampler=False)"
            )
        self._num_batches = 0
        if trainer.current_epoch == 0:
            self._num_epochs, self._asked_after = 0, -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares the first epoch: loaders with workers draw its first batches right after this."""
        self._module_has_tree = any(module is self.refresh.tree for module in pl_module.modules())
        self._begin_epoch(trainer, pl_module)
        if self.sampler is not None and self._num_batches > 0:
            self._skip_batches(self.sampler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the batches are those of the sampler."""
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            return
        if self.sampler is not None and loader.batch_sampler is not self.sampler:
            raise ValueError(
                f"the training loader draws from another sampler than TreeRefreshCallback has, {loader.batch_sampler!r}; "
                "give the loader batch_sampler=htl.sampler, and the callback the same"
            )
        if self.sampler is None and isinstance(loader.batch_sampler, AnchorNeighborSampler):
            raise ValueError(
                "the training loader has an AnchorNeighborSampler that TreeRefreshCallback does not know; "
                "give it as TreeRefreshCallback(refresh, htl.sampler), so that it is told which epoch begins"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning iterates the loader anew after this."""
        self._begin_epoch(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Counts; a checkpoint of the last batch says that its epoch is done."""
        self._num_batches += 1
        if trainer.is_last_batch:
            self._end_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refreshes the tree if it is time to. Lightning calls its checkpoint callbacks after all others."""
        if self._num_batches > 0:  # the epoch was broken off; one without any batch was only gone on with
            self._end_epoch()
        self._refresh_if_due(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this: numbers, and the tree unless the module has it."""
        state: dict[str, Any] = {
            "num_epochs": self._num_epochs,
            "num_batches": self._num_batches,
            "asked_after": self._asked_after,
            "num_refreshes": self.refresh.num_refreshes,
        }
        if self.sampler is not None:
            state["sampler_seed"] = self.sampler.seed
        if not self._module_has_tree:
            state["tree"] = self.refresh.tree.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            RuntimeError: the tree is of other classes or of another number of levels.
        """
        if "tree" in state_dict:
            self.refresh.tree.load_state_dict(state_dict["tree"])
        self._num_epochs, self._num_batches = state_dict["num_epochs"], state_dict["num_batches"]
        self._asked_after = state_dict["asked_after"]
        self.refresh.num_refreshes = state_dict["num_refreshes"]
        if self.sampler is not None and "sampler_seed" in state_dict:
            self.sampler.seed = state_dict["sampler_seed"]

    def _begin_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refresh_if_due(trainer, pl_module)
        if self.sampler is not None:
            self.sampler.set_epoch(self._num_epochs)

    def _skip_batches(self, sampler: AnchorNeighborSampler) -> None:
        """Draws the batches of the epoch that were trained with, and has the next iteration go on after them."""
        # The sampler's own state in the file would be that of batches drawn ahead; its tree is the same throughout an epoch.
        batches = iter(sampler)
        for _ in range(self._num_batches):
            next(batches)
        sampler.load_state_dict(sampler.state_dict())

    def _end_epoch(self) -> None:
        self._num_epochs += 1
        self._num_batches = 0

    def _refresh_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks the refresh once after each epoch, and once before the first."""
        if self._asked_after == self._num_epochs:
            return
        if self.refresh.is_due(self._num_epochs):

            def inputs_and_labels(batch: Any) -> tuple[Any, Labels]:
                inputs, labels = batch if self.data_and_label_getter is None else self.data_and_label_getter(batch)
                return trainer.precision_plugin.convert_input(inputs), labels

            with trainer.precision_plugin.val_step_context():
                self.refresh.refresh(
                    pl_module,
                    device=pl_module.device,
                    data_and_label_getter=inputs_and_labels,
                    collate_fn=self.collate_fn,
                )
        self._asked_after = self._num_epochs


def _check(refresh: TreeRefresh, sampler: AnchorNeighborSampler | None) -> None:
    if not isinstance(refresh, TreeRefresh):
        raise TypeError(f"refresh must be a TreeRefresh, as HTL.refresh_hook makes it, but it is a {type(refresh).__name__}")
    if sampler is not None and not isinstance(sampler, AnchorNeighborSampler):
        raise TypeError(f"sampler must be an AnchorNeighborSampler or None, but it is a {type(sampler).__name__}")
    if sampler is not None and sampler.tree is not refresh.tree:
        raise ValueError("the sampler has another tree than the refresh; give both the same")
    if refresh.every_n_iterations is not None:
        raise ValueError(
            "every_n_iterations is for PML's trainers: Lightning's loader draws batches ahead, and cannot be started anew "
            "within an epoch; use every_n_epochs, with fewer batches_per_epoch in the sampler"
        )
    if refresh.then is not None or refresh.then_each_iteration is not None:
        raise ValueError("then and then_each_iteration are hooks of PML's trainers; give the Lightning trainer callbacks")


def _replaces_samplers(trainer: Trainer) -> bool:
    # Lightning tells nobody. Where this is not to be found, its own error comes later, and says less.
    return getattr(getattr(trainer, "_accelerator_connector", None), "use_distributed_sampler", False)
