"""The callback in real Lightning fits, of one process and of two, and fits that go on from Lightning's checkpoints."""

import copy
import logging
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from torch.utils.data import DataLoader, TensorDataset

from pml_htl import AnchorNeighborSampler, ClassTree
from pml_htl.lightning import TreeRefreshCallback

from . import training
from .processes import environment
from .training import make_dataset, make_models, same_tree

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
DATASET = make_dataset()
INPUT_ROWS, LABELS = DATASET.tensors


# Lightning warns of validation that is not asked for, and of flags that would be faster.
pytestmark = pytest.mark.filterwarnings(r"ignore:::(lightning|pytorch_lightning)\..*")


@pytest.fixture(scope="module", autouse=True)
def one_quiet_thread():
    """For steps this small one thread is faster, and the same in every run to the last bit."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_htl(labels, **kwargs):
    return training.make_htl(labels, **{"batches_per_epoch": 4, **kwargs})


def make_module(htl, base=lightning.pytorch.LightningModule, keeps_loss=True, dropout=True):
    """A module that holds the loss, or not; `rows` are the batches that it has been given, by their samples."""

    class Module(base):
        def __init__(self):
            super().__init__()
            models = make_models()
            if not dropout:  # what it draws is not in a checkpoint
                models["trunk"] = models["trunk"][:3]
            self.network = torch.nn.Sequential(models["trunk"], models["embedder"])
            if keeps_loss:
                self.loss = htl.loss
            self.rows = []

        def forward(self, x):
            return self.network(x)

        def training_step(self, batch, index):
            x, y = batch
            self.rows.append(x[:, 0].tolist())
            return htl.loss(self(x), y)

        def validation_step(self, batch, index):
            self.log("score", self(batch[0]).mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9)

    return Module()


def rows_of(batches):
    return [INPUT_ROWS[indices, 0].tolist() for indices in batches]


def loader_of(htl, **kwargs):
    return DataLoader(DATASET, batch_sampler=htl.sampler, **kwargs)


def fit(htl, callbacks, max_epochs=3, module=None, loader=None, validate=False, ckpt_path=None, **flags):
    flags = {**QUIET, "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks), **flags}
    trainer = lightning.pytorch.Trainer(max_epochs=max_epochs, callbacks=callbacks, **flags)
    module = make_module(htl) if module is None else module
    val_loader = DataLoader(DATASET, batch_size=50) if validate else None
    trainer.fit(module, loader_of(htl) if loader is None else loader, val_loader, ckpt_path=ckpt_path)
    return module


class Witness(Callback):
    """Keeps the tree as it was when each epoch's training began, and how many refreshes there had been."""

    def __init__(self, refresh):
        self.refresh, self.trees, self.refreshes = refresh, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        if index == 0:
            self.trees.append(copy.deepcopy(self.refresh.tree))
            self.refreshes.append(self.refresh.num_refreshes)


LOADERS = {
    "no workers": {},
    "workers": {"num_workers": 2},
    "persistent workers": {"num_workers": 1, "persistent_workers": True},
}


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize("kind", LOADERS)
def test_batches_are_those_of_set_epoch_and_of_the_tree_of_their_epoch(kind, warmup_epochs):
    htl = make_htl(LABELS)
    refresh = htl.refresh_hook(DATASET, warmup_epochs=warmup_epochs)
    witness = Witness(refresh)
    module = fit(htl, [witness, TreeRefreshCallback(refresh, htl.sampler)], loader=loader_of(htl, **LOADERS[kind]))

    def expected(epoch, tree):
        sampler = AnchorNeighborSampler(
            LABELS, tree, num_anchors=3, neighborhood_size=3, samples_per_class=2, batches_per_epoch=4, seed=0
        )
        sampler.set_epoch(epoch)
        return rows_of(sampler)

    per_epoch = len(htl.sampler)
    drawn = [module.rows[epoch * per_epoch : (epoch + 1) * per_epoch] for epoch in range(3)]
    assert [tree.is_fitted for tree in witness.trees] == [warmup_epochs == 0, True, True]
    assert drawn == [expected(epoch, witness.trees[epoch]) for epoch in range(3)]
    assert drawn[2] != expected(2, witness.trees[1])  # otherwise this would show nothing


def test_the_tree_is_that_of_forward_in_eval_mode_and_the_module_trains_on():
    htl = make_htl(LABELS)
    modes = []

    class Modes(Callback):
        def on_train_end(self, trainer, pl_module):
            modes.extend(module.training for module in pl_module.modules())

    module = fit(htl, [TreeRefreshCallback(htl.refresh_hook(DATASET), htl.sampler), Modes()])
    with torch.no_grad():
        expected = ClassTree().fit_embeddings(module.eval()(INPUT_ROWS), LABELS)
    assert same_tree(htl.tree, expected) and torch.allclose(htl.tree.spreads, expected.spreads)
    assert all(modes)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ({"warmup_epochs": 0}, [1, 2, 3, 4]),
        ({}, [0, 1, 2, 3]),
        ({"warmup_epochs": 2}, [0, 0, 1, 2]),
        ({"every_n_epochs": 2}, [0, 1, 1, 2]),
        ({"warmup_epochs": 0, "every_n_epochs": 3}, [1, 1, 1, 2]),
    ],
)
def test_refreshes_come_when_they_do_in_pmls_trainers(schedule, expected):
    htl = make_htl(LABELS)
    refresh = htl.refresh_hook(DATASET, **schedule)
    witness = Witness(refresh)
    fit(htl, [TreeRefreshCallback(refresh, htl.sampler), witness], max_epochs=4)
    assert witness.refreshes == expected


def test_a_trainer_that_fits_again_goes_on_and_another_begins_anew():
    htl = make_htl(LABELS)
    refresh = htl.refresh_hook(DATASET, warmup_epochs=2)
    callback, witness = TreeRefreshCallback(refresh, htl.sampler), Witness(refresh)
    trainer = lightning.pytorch.Trainer(max_epochs=2, callbacks=[callback, witness], enable_checkpointing=False, **QUIET)
    module = make_module(htl)
    trainer.fit(module, loader_of(htl))
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader_of(htl))
    assert witness.refreshes == [0, 0, 1, 2]
    fit(htl, [callback, witness], max_epochs=2)
    assert witness.refreshes[4:] == [3, 3]


def run(epochs, keeps_loss=True, seed=0, num_workers=0, checkpoint=None, validate=False, ckpt_path=None):
    """A fit of objects of its own; without dropout, since a checkpoint does not hold what that draws."""
    htl = make_htl(LABELS, seed=seed, batches_per_epoch=3)
    refresh = htl.refresh_hook(DATASET, samples_per_class=4)  # others each time, by the number of refreshes
    callbacks = [TreeRefreshCallback(refresh, htl.sampler)]
    if checkpoint is not None:
        callbacks.insert(0, checkpoint)
    module = make_module(htl, keeps_loss=keeps_loss, dropout=False)
    loader = loader_of(htl, num_workers=num_workers)
    fit(htl, callbacks, epochs, module=module, loader=loader, validate=validate, ckpt_path=ckpt_path)
    return htl, module, refresh


@pytest.fixture(scope="module")
def straight():
    return run(4)


END_OF_EPOCH, AFTER_VALIDATION = {"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}
AFTER_BATCH_6 = {"every_n_train_steps": 6}  # the last of an epoch
AFTER_BATCH_5 = {"every_n_train_steps": 5}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "when, validate, keeps_loss",
    [
        (END_OF_EPOCH, False, True),
        (END_OF_EPOCH, False, False),
        (END_OF_EPOCH, True, True),
        (AFTER_VALIDATION, True, False),
        (AFTER_BATCH_6, False, True),
        (AFTER_BATCH_5, False, False),
    ],
)
def test_a_fit_goes_on_from_lightnings_checkpoint(when, validate, keeps_loss, num_workers, tmp_path, straight):
    """Two epochs, a file, and two more of new objects with another seed, against four in one go: the same in every bit."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
    run(2, keeps_loss, checkpoint=checkpoint, validate=validate)
    step = when.get("every_n_train_steps", 6)
    path = tmp_path / f"step={step}.ckpt"
    resumed, module, refresh = run(4, keeps_loss, seed=7, num_workers=num_workers, validate=validate, ckpt_path=path)
    straight_htl, straight_module, straight_refresh = straight
    assert module.rows == straight_module.rows[step:]
    assert same_state(resumed.tree, straight_htl.tree) and same_state(module.network, straight_module.network)
    assert refresh.num_refreshes == straight_refresh.num_refreshes == 4


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("keeps_loss", [True, False])
def test_a_checkpoint_of_an_epochs_end_holds_the_new_tree(keeps_loss, tmp_path):
    htl = make_htl(LABELS)
    checkpoint = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True)
    module = make_module(htl, keeps_loss=keeps_loss)
    fit(htl, [checkpoint, TreeRefreshCallback(htl.refresh_hook(DATASET), htl.sampler)], module=module)
    in_file = torch.load(checkpoint.best_model_path, weights_only=True)
    if keeps_loss:
        prefix = "loss.miner.tree."
        names = [name for name in in_file["state_dict"] if name.startswith(prefix)]
        state = {name.removeprefix(prefix): in_file["state_dict"][name] for name in names}
    else:
        state = in_file["callbacks"]["TreeRefreshCallback"]["tree"]
    tree = ClassTree()
    tree.load_state_dict(state)
    assert same_state(tree, htl.tree) and tree.is_fitted


def test_a_tree_of_other_classes_is_refused_and_stays():
    htl, other = make_htl(LABELS), make_htl(LABELS + 1)
    for one, labels in ((htl, LABELS), (other, LABELS + 1)):
        one.tree.fit_embeddings(INPUT_ROWS, labels)
    state = TreeRefreshCallback(other.refresh_hook(DATASET), other.sampler).state_dict()
    before = copy.deepcopy(htl.tree)
    with pytest.raises(RuntimeError, match="only one of them has"):
        TreeRefreshCallback(htl.refresh_hook(DATASET), htl.sampler).load_state_dict(state)
    assert same_state(htl.tree, before)


def test_streaming(tmp_path):
    """The tree is that of the batches that the loss has seen, and goes on from a checkpoint."""
    htl = make_htl(LABELS, batches_per_epoch=8)
    refresh = htl.refresh_hook(None, mode="streaming", warmup_epochs=0)
    witness, checkpoint = Witness(refresh), ModelCheckpoint(tmp_path)
    fit(htl, [checkpoint, TreeRefreshCallback(refresh, htl.sampler), witness])
    assert witness.refreshes == [0, 1, 2]
    assert same_tree(htl.tree, ClassTree().fit(refresh.watch.up_to_date()))
    resumed = make_htl(LABELS, batches_per_epoch=8)
    refresh = resumed.refresh_hook(None, mode="streaming")
    witness = Witness(refresh)
    callbacks = [TreeRefreshCallback(refresh, resumed.sampler), witness]
    fit(resumed, callbacks, max_epochs=4, ckpt_path=checkpoint.best_model_path)
    assert witness.refreshes == [3] and same_state(witness.trees[0], htl.tree)
    assert refresh.num_refreshes == 4


@pytest.mark.parametrize("precision, dtype", [("64-true", torch.float64), ("bf16-mixed", torch.bfloat16)])
def test_it_embeds_in_the_precision_of_the_trainer(precision, dtype):
    htl = make_htl(LABELS)
    module = make_module(htl)
    seen = []
    module.network.register_forward_hook(lambda network, inputs, output: seen.append((network.training, output.dtype)))
    fit(htl, [TreeRefreshCallback(htl.refresh_hook(DATASET), htl.sampler)], module=module, precision=precision)
    assert set(seen) == {(True, dtype), (False, dtype)} and htl.tree.is_fitted


def with_validation_loss(module, loss, seen):
    """The module, whose validation step puts the loss, and PML's with the initial margin, of every batch into `seen`."""
    twin = TripletMarginLoss(loss.miner.initial_margin, distance=LpDistance(power=2))

    def validation_step(self, batch, index):
        x, y = batch
        embeddings = self(x)
        value = loss(embeddings, y)
        seen.append((loss.miner.tree.is_fitted, value.item(), twin(embeddings, y).item()))
        self.log("val_loss", value)

    type(module).validation_step = validation_step  # of this module alone: each has a class of its own
    return module


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_loss_on_unseen_classes(streaming):
    htl, plain, seen = make_htl(LABELS, batches_per_epoch=8), make_htl(LABELS, batches_per_epoch=8), []
    validation = DataLoader(TensorDataset(INPUT_ROWS, LABELS + 1000), batch_size=48)
    for one in (htl, plain):
        refresh = one.refresh_hook(None, mode="streaming") if streaming else one.refresh_hook(DATASET)
        trainer = lightning.pytorch.Trainer(
            max_epochs=3, callbacks=[TreeRefreshCallback(refresh, one.sampler)], enable_checkpointing=False, **QUIET
        )
        module = make_module(one, dropout=False)
        trainer.fit(with_validation_loss(module, htl.loss, seen) if one is htl else module, loader_of(one), validation)
        assert ("val_loss" in trainer.callback_metrics) == (one is htl)
    assert {is_fitted for is_fitted, _, _ in seen} == {False, True} and len(seen) == 2 + 3 * 3  # two of a sanity check
    assert [value for _, value, _ in seen] == pytest.approx([twin for _, _, twin in seen], rel=1e-5)
    assert same_state(htl.tree, plain.tree)  # it leaves no trace


def test_an_unseen_class_in_training_is_an_error():
    htl = make_htl(LABELS)
    htl.tree.fit_embeddings(torch.randn(len(LABELS), 8), LABELS)
    module = make_module(htl)
    loader = DataLoader(TensorDataset(INPUT_ROWS, LABELS + 1000), batch_size=48)
    with pytest.raises(ValueError, match="not among the 24 classes of the class tree"):
        fit(htl, [], module=module, loader=loader)


class Dictionaries(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


def test_batches_of_other_forms_by_getter_and_collate_function():
    htl, plain = make_htl(LABELS), make_htl(LABELS)
    dataset = Dictionaries(INPUT_ROWS / 2, LABELS)

    def double(samples):
        batch = torch.utils.data.default_collate(samples)
        return {"x": 2 * batch["x"], "y": batch["y"]}

    refresh = htl.refresh_hook(dataset)
    arguments = {"data_and_label_getter": lambda batch: (batch["x"], batch["y"]), "collate_fn": double}
    fit(htl, [TreeRefreshCallback(refresh, htl.sampler, **arguments)])
    fit(plain, [TreeRefreshCallback(plain.refresh_hook(DATASET), plain.sampler)])
    assert same_state(htl.tree, plain.tree)


def test_the_package_under_its_other_name():
    htl = make_htl(LABELS)
    callback = TreeRefreshCallback(htl.refresh_hook(DATASET), htl.sampler)
    trainer = pytorch_lightning.Trainer(max_epochs=2, callbacks=[callback], enable_checkpointing=False, **QUIET)
    trainer.fit(make_module(htl, base=pytorch_lightning.LightningModule), loader_of(htl))
    assert htl.tree.is_fitted and callback.refresh.num_refreshes == 2


def test_another_sampler_needs_none():
    htl = make_htl(LABELS)
    refresh = htl.refresh_hook(DATASET)
    fit(htl, [TreeRefreshCallback(refresh)], loader=DataLoader(DATASET, batch_size=48, shuffle=True))
    assert refresh.num_refreshes == 3


def test_a_fit_with_lightnings_own_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    htl = make_htl(LABELS)
    callback = TreeRefreshCallback(htl.refresh_hook(DATASET), htl.sampler)
    trainer = lightning.pytorch.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback])
    trainer.fit(make_module(htl), loader_of(htl))
    assert callback.refresh.num_refreshes == 2
    resumed = make_htl(LABELS)
    callback = TreeRefreshCallback(resumed.refresh_hook(DATASET), resumed.sampler)
    fit(resumed, [callback], max_epochs=2, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert same_state(resumed.tree, htl.tree)


def test_a_failed_refresh_ends_the_fit_and_leaves_the_tree():
    htl = make_htl(LABELS)
    broken = TensorDataset(torch.full_like(INPUT_ROWS, torch.nan), LABELS)
    with pytest.raises(ValueError, match="NaN"):
        fit(htl, [TreeRefreshCallback(htl.refresh_hook(broken), htl.sampler)])
    assert not htl.tree.is_fitted


def make_callback(sampler=None, **kwargs):
    htl = make_htl(LABELS)
    return TreeRefreshCallback(htl.refresh_hook(DATASET, **kwargs), htl.sampler if sampler is None else sampler)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: TreeRefreshCallback(make_htl(LABELS), None), TypeError, "refresh must be a TreeRefresh, .*but it is a HTL"),
        (lambda: make_callback(sampler=LABELS), TypeError, "must be an AnchorNeighborSampler or None, but it is a Tensor"),
        (lambda: make_callback(sampler=make_htl(LABELS).sampler), ValueError, "another tree .*give both the same"),
        (
            lambda: make_callback(every_n_iterations=5),
            ValueError,
            "every_n_iterations is for PML's trainers.*every_n_epochs",
        ),
        (lambda: make_callback(then=print), ValueError, "hooks of PML's trainers"),
        (lambda: make_callback(then_each_iteration=print), ValueError, "hooks of PML's trainers"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_loader_without_the_sampler_is_refused():
    htl = make_htl(LABELS)
    callback = TreeRefreshCallback(htl.refresh_hook(DATASET), htl.sampler)
    for loader in (DataLoader(DATASET, batch_size=18), loader_of(make_htl(LABELS))):
        with pytest.raises(ValueError, match=r"another sampler than .*batch_sampler=htl\.sampler"):
            fit(htl, [callback], loader=loader)
    with pytest.raises(ValueError, match=r"give it as TreeRefreshCallback\(refresh, htl\.sampler\)"):
        fit(htl, [TreeRefreshCallback(htl.refresh_hook(DATASET))])
    assert not htl.tree.is_fitted


def test_two_processes_need_a_trainer_that_leaves_samplers_alone():
    flags = {**QUIET, "devices": 2, "strategy": "ddp", "max_epochs": 1, "enable_checkpointing": False}
    callback = make_callback()
    with pytest.raises(ValueError, match=r"in each of the 2 processes; give it .*use_distributed_sampler=False"):
        callback.setup(lightning.pytorch.Trainer(**flags), None, "fit")
    callback.setup(lightning.pytorch.Trainer(use_distributed_sampler=False, **flags), None, "fit")


SCRIPT = Path(__file__).with_name("lightning_script.py")


@pytest.mark.slow
def test_two_processes_have_one_tree_and_go_on_from_their_checkpoint(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [f"{name}-{rank}.pt" for name in ("straight", "resumed") for rank in (0, 1)]
    states = [torch.load(tmp_path / name, weights_only=True) for name in names]
    first_half, second_half, *resumed_halves = [state.pop("rows") for state in states]
    assert "tree.nodes" in states[0]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    assert first_half.shape == (12, 12) and not torch.isin(first_half[0], second_half[0]).any()
    assert torch.equal(resumed_halves[0], first_half[8:]) and torch.equal(resumed_halves[1], second_half[8:])


def test_an_epoch_that_is_broken_off_counts():
    htl = make_htl(LABELS)
    refresh = htl.refresh_hook(DATASET)
    witness, module = Witness(refresh), make_module(htl)
    module.on_train_batch_start = lambda batch, index: -1 if index == 2 else None
    fit(htl, [witness, TreeRefreshCallback(refresh, htl.sampler)], module=module)
    assert witness.refreshes == [0, 1, 2] and refresh.num_refreshes == 3
    htl.sampler.set_epoch(0)
    htl.tree.load_state_dict(ClassTree().state_dict())
    assert module.rows[:2] == rows_of(htl.sampler)[:2] and len(module.rows) == 6


@pytest.mark.slow
def test_only_this_module_needs_lightning():
    code = """
import sys
import pml_htl
assert not [name for name in sys.modules if name.partition(".")[0] in ("lightning", "pytorch_lightning")]
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import pml_htl.lightning
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r'ImportError: pml_htl\.lightning needs Lightning: pip install "pml-htl\[lightning\]"', last)
