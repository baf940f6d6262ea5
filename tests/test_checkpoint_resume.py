"""Stopping and going on: what was stopped anywhere ends, bit for bit, like what was not."""

import copy
import io
import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.samplers import MPerClassSampler
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.methods.contenders import parse_contender
from benchmarks.training.resuming import RunFiles
from benchmarks.training.train import Plan, train
from pml_htl import ClassStatistics, checkpoint
from pml_htl.checkpoint import Checkpoint, CheckpointHook
from pml_htl.losses import CrossBatchMemory
from pml_htl.refreshing.streaming import LossWatch

from .examples import labelled_embeddings
from .kill_and_resume import PLACES, few_classes, same
from .training import INPUTS, make_dataset, make_htl, make_models, make_trainer, training_steps

ROOT = Path(__file__).parents[1]
DATASET = make_dataset()
LABELS = DATASET.tensors[1]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# States of the parts


@given(labelled_embeddings(), st.floats(0.1, 1.0), st.integers(0, 5))
def test_statistics_go_on(example, forget, stop):
    embeddings, labels = map(torch.from_numpy, example)
    whole, before, after = (ClassStatistics(labels, embeddings.shape[1], forget=forget) for _ in range(3))
    parts = list(torch.arange(len(labels)).split(3))
    after.update(embeddings[:1], labels[:1])  # forgotten
    for part in parts:
        whole.update(embeddings[part], labels[part])
    for part in parts[:stop]:
        before.update(embeddings[part], labels[part])
    state = before.state_dict()
    saved = through_a_file(state)
    before.update(embeddings, labels)
    assert same(state, saved)  # a copy
    after.load_state_dict(saved)
    for part in parts[stop:]:
        after.update(embeddings[part], labels[part])
    assert same(after.state_dict(), whole.state_dict())


LABELS_OF_TWO = torch.tensor([3, 3, 7, 7])
FOREIGN_STATISTICS = [
    ({"labels": torch.tensor([3, 8])}, "only one of them has labels 7, 8"),
    ({"labels": [3, 7]}, r"should be \(C,\) int64"),
    ({"embedding_size": 3}, "embedding_size=3, but this one has embedding_size=2"),
    ({"normalize": False}, "normalize=False"),
    ({"forget": 0.25}, "forget=0.25, but this one has forget=0.5"),
    (
        {"counts": torch.tensor([1.0, 2.0])},
        r"counts of the state should be torch.int64 of shape \(2,\), but is torch.float32",
    ),
    ({"sums": torch.zeros(2, 3, dtype=torch.float64)}, r"sums .* shape \(2, 2\), but is torch.float64 of shape \(2, 3\)"),
    ({"weights": torch.tensor([1.0, torch.inf], dtype=torch.float64)}, "not finite"),
    ({"squared_norms": torch.tensor([1.0, -1.0], dtype=torch.float64)}, "negative"),
    ({"sums": None}, "NoneType"),
    ({"more": 1}, "but this has .*more"),
]


@pytest.mark.parametrize("change, message", FOREIGN_STATISTICS, ids=lambda value: next(iter(value)) if value else "")
def test_foreign_statistics_are_refused(change, message):
    statistics = ClassStatistics(LABELS_OF_TWO, 2, forget=0.5).update(torch.eye(4)[:, :2] + 0.1, LABELS_OF_TWO)
    before = statistics.state_dict()
    with pytest.raises(ValueError, match=message):
        statistics.load_state_dict({**before, **change})
    with pytest.raises(ValueError, match="but this has list"):
        statistics.load_state_dict([])
    assert same(statistics.state_dict(), before)


@settings(max_examples=15)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 99))
def test_a_watch_goes_on_with_batches_in_its_buffer(stop, more, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(4, 5, generator=generator), torch.randint(6, (4,), generator=generator)) for _ in range(40)]
    batches[min(stop, 39)][0][0, 0] = torch.nan  # broken ones are counted across the stop
    watches = [LossWatch(torch.nn.TripletMarginLoss(), torch.arange(6), 0.7) for _ in range(3)]
    whole, before, after = watches

    def note(watch, some):
        for embeddings, labels in some:
            watch.note(embeddings.clone().requires_grad_(), labels)

    note(whole, batches[: stop + more])
    note(before, batches[:stop])
    note(after, batches[:3])
    after.load_state_dict(through_a_file(before.state_dict()))
    note(after, batches[stop : stop + more])
    assert same(after.state_dict(), whole.state_dict())


def test_a_foreign_state_of_a_refresh_is_refused():
    htl = make_htl(LABELS)
    full, streaming = htl.refresh_hook(DATASET), htl.refresh_hook(None, mode="streaming")
    other = make_htl(LABELS + 3).refresh_hook(None, mode="streaming")
    forgets_less = htl.refresh_hook(None, mode="streaming", forget=0.9)
    for refresh, state, message in [
        (full, streaming.state_dict(), "TreeRefresh with mode='streaming', but this one has mode='full'"),
        (streaming, full.state_dict(), "mode='full'"),
        (streaming, other.state_dict(), "24 classes, but this one has 24, and only one of them has labels -7, 65"),
        (streaming, forgets_less.state_dict(), "forget=0.9, but this one has forget=0.5"),
        (full, {**full.state_dict(), "num_refreshes": -1}, "num_refreshes of the state must be an integer of at least 0"),
        (full, {}, "but this has"),
    ]:
        before = refresh.state_dict()
        with pytest.raises(ValueError, match=message):
            refresh.load_state_dict(state)
        assert same(refresh.state_dict(), before)


# The file


def a_model():
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def draws():
    return [random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]


def test_random_states_and_progress_come_back(tmp_path):
    generator, sampler = torch.Generator().manual_seed(3), MPerClassSampler(LABELS, 2, 12, 24)
    saved = Checkpoint(tmp_path / "new" / "state.pt", **a_model(), generator=generator, sampler=sampler)
    assert saved.load() is None
    np.random.randn()  # half of a pair: the other is kept for the next
    list(sampler)
    saved.save(epoch=3, note="x", losses=[0.5])

    def all_draws():
        return [draws(), torch.rand(3, generator=generator).tolist(), list(sampler)]

    expected = all_draws()
    assert saved.load() == {"epoch": 3, "note": "x", "losses": [0.5]}
    assert all_draws() == expected
    other = MPerClassSampler(LABELS, 2, 12, 24)
    Checkpoint(saved.path, **a_model(), generator=generator, sampler=other).load()
    sampler = other
    assert all_draws() == expected
    assert [path.name for path in saved.path.parent.iterdir()] == ["state.pt"]


class Refusing(torch.nn.Module):
    """Takes no state but its own. Not by `id`, which a later one may have again."""

    numbers = count()

    def __init__(self):
        super().__init__()
        self.number = next(self.numbers)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        if state_dict["_extra_state"] != self.get_extra_state():
            raise KeyError("not mine")

    def get_extra_state(self):
        return self.number


def test_what_cannot_be_loaded_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "state.pt"
    Checkpoint(path, **a_model(), refusing=Refusing()).save()
    parts = a_model()
    for other, message in [
        ({"refusing": Refusing()}, "refusing does not take its state from .*not mine"),
        ({}, r"only the file has refusing \(Refusing\), and only this checkpoint has nothing"),
        ({"refusing": torch.nn.Linear(1, 1)}, r"only this checkpoint has refusing \(Linear\)"),
        ({"refusing": Refusing(), "model": torch.nn.Linear(4, 2)}, "(?s)model does not take .*size mismatch"),
    ]:
        own = {**parts, **other}
        before = copy.deepcopy({name: part.state_dict() for name, part in own.items() if name != "refusing"})
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        with pytest.raises(ValueError, match=message):
            Checkpoint(path, **own).load()
        assert same({name: own[name].state_dict() for name in before}, before)
        assert torch.equal(torch.rand(1), expected)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "state.pt"
    torch.manual_seed(0)
    Checkpoint(path, **a_model()).save(step=1)
    return path


@settings(max_examples=20)
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_refused(whole_file, share):
    content = whole_file.read_bytes()
    path = whole_file.with_name("broken.pt")
    path.write_bytes(content[: int(share * len(content))])
    parts = a_model()
    before = copy.deepcopy(parts["model"].state_dict())
    with pytest.raises(ValueError, match=r"broken\.pt is no checkpoint that can be read"):
        Checkpoint(path, **parts).load()
    assert same(parts["model"].state_dict(), before)


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_does_not_matter(whole_file, place, bit):
    """torch.load alone would take other weights. Some bytes, such as those that align the entries, mean nothing."""
    content = bytearray(whole_file.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path = whole_file.with_name("broken.pt")
    path.write_bytes(content)
    parts, expected = a_model(), a_model()
    Checkpoint(whole_file, **expected).load()
    try:
        assert Checkpoint(path, **parts).load() == {"step": 1}
    except ValueError as error:
        assert "broken.pt is no checkpoint that can be read" in str(error)
    else:
        assert all(same(parts[name].state_dict(), expected[name].state_dict()) for name in parts)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    for content in ({"format": "another", "kinds": {}, "progress": {}, "states": {}}, a_model()["model"].state_dict(), [1]):
        torch.save(content, path)
        with pytest.raises(ValueError, match="no checkpoint that can be read"):
            Checkpoint(path).load()


def test_the_old_file_stays_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    saved = Checkpoint(tmp_path / "state.pt", **a_model())
    saved.save(step=1)
    with pytest.raises(ValueError, match="Unsupported global"):
        saved.save(step=np.float64(2))
    with pytest.raises(ValueError, match="batches_consumed is of an AnchorNeighborSampler"):
        saved.save(batches_consumed=3)
    monkeypatch.setattr(checkpoint.os, "replace", lambda *paths: sys.exit("killed"))
    with pytest.raises(SystemExit):
        saved.save(step=2)
    monkeypatch.undo()
    (tmp_path / "state.pt.partial").write_bytes(b"half")  # what a kill leaves
    assert saved.load() == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_parts_without_a_state_are_refused(tmp_path):
    for make in (Checkpoint, CheckpointHook):
        with pytest.raises(TypeError, match="rate has no state_dict"):
            make(tmp_path / "state.pt", rate=0.1)
    with pytest.raises(TypeError, match="then must be a hook"):
        CheckpointHook(tmp_path / "state.pt", then=3)


# Plain loops


def plain_loop(path, steps, save_every, mode, workers=0):
    """Six batches an epoch; dropout draws from the global generator."""
    model = torch.nn.Sequential(*make_models().values())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    htl = make_htl(LABELS, batches_per_epoch=6, seed=None)
    refresh = htl.refresh_hook(DATASET, mode=mode, samples_per_class=3 if mode == "full" else None, batch_size=144)
    loader = DataLoader(DATASET, batch_sampler=htl.sampler, num_workers=workers, generator=torch.Generator())
    parts = {"model": model, "optimizer": optimizer, "loss": htl.loss, "sampler": htl.sampler, "refresh": refresh}
    saved = Checkpoint(path, **parts)
    done = (saved.load() or {"step": 0})["step"]
    for step in training_steps(parts, loader, done, steps):
        if step % 6 == 0:
            refresh.refresh(model)
        if step % save_every == 0:
            saved.save(step=step, batches_consumed=(step - 1) % 6 + 1)
    states = {name: part.state_dict() for name, part in parts.items() if name != "sampler"}
    return {**states, "refresh": {**states["refresh"], "seconds": None}, "random": torch.get_rng_state()}


EXPECTED = {}


@settings(max_examples=5)
@given(st.integers(1, 14), st.integers(1, 8), st.sampled_from(["full", "streaming"]))
@pytest.mark.filterwarnings("ignore:the tree stays as it is")
def test_a_plain_loop_stopped_anywhere(tmp_path_factory, stop, save_every, mode):
    folder = tmp_path_factory.mktemp("plain")
    if mode not in EXPECTED:
        EXPECTED[mode] = plain_loop(folder / "whole.pt", 15, 100, mode)
    plain_loop(folder / "state.pt", stop, save_every, mode)
    assert same(plain_loop(folder / "state.pt", 15, save_every, mode), EXPECTED[mode])


def test_a_plain_loop_with_workers_that_draw_ahead(tmp_path):
    expected = plain_loop(tmp_path / "whole.pt", 15, 100, "full")
    plain_loop(tmp_path / "state.pt", 10, 3, "full", workers=2)
    assert same(plain_loop(tmp_path / "state.pt", 15, 3, "full", workers=2), expected)


# PML's trainers


class Stopped(Exception):
    """In place of a kill."""


def trained(path, stop=None, epochs=4, sampler="neighbors", workers=0, mode="full", memory=False, noise=None):
    """All that a training ends with; `stop` is the iteration in which it breaks off."""
    np.random.seed(0)
    torch.manual_seed(0)
    htl = make_htl(LABELS, seed=None)
    models = make_models()
    optimizers = {f"{name}_optimizer": torch.optim.Adam(model.parameters(), 0.01) for name, model in models.items()}
    schedulers = {"trunk_scheduler_by_iteration": torch.optim.lr_scheduler.StepLR(optimizers["trunk_optimizer"], 5)}
    dataset = DATASET if noise is None else Noisy(noise)

    def test(trainer):  # draws from the global generators, as a visualizer may
        draws()
        return trainer.epoch < 3 if noise is None else None

    refresh = htl.refresh_hook(DATASET, then=test, mode=mode)
    hook = CheckpointHook(path, refresh)

    def each_iteration(trainer):
        if stop is not None and trainer.get_global_iteration() == stop:
            raise Stopped

    trainer = make_trainer(
        htl,
        dataset,
        hook,
        models=models,
        optimizers=optimizers,
        lr_schedulers=schedulers,
        sampler=htl.sampler if sampler == "neighbors" else MPerClassSampler(LABELS, 2, htl.batch_size, 18 * 100),
        loss_funcs={"metric_loss": CrossBatchMemory(htl.loss, 8, 50) if memory else htl.loss},
        mining_funcs={"tuple_miner": htl.miner} if not memory else {},
        dataloader_num_workers=workers,
        end_of_iteration_hook=each_iteration,
    )
    try:
        trainer.train(hook.resume(trainer), epochs)
    except Stopped:
        return None
    parts = {**models, **optimizers, **schedulers, **trainer.loss_funcs}
    return {
        **{name: part.state_dict() for name, part in parts.items()},
        "refreshes": refresh.num_refreshes,
        "epoch": trainer.epoch,
    }


class Noisy(TensorDataset):
    """Augments from the global generators, in the loader's processes."""

    def __init__(self, noise):
        super().__init__(*DATASET.tensors)
        self.noise = noise

    def __getitem__(self, index):
        inputs, label = super().__getitem__(index)
        return inputs + self.noise * torch.randn(INPUTS), label


TRAINERS = [
    {"noise": 0.1},
    pytest.param({"noise": 0.1, "workers": 1}, marks=pytest.mark.slow),
    {"noise": 0.1, "sampler": "per-class"},
    pytest.param({"noise": 0.1, "sampler": "per-class", "workers": 1}, marks=pytest.mark.slow),
    {"noise": 0.1, "mode": "streaming"},
    {"noise": 0.1, "memory": True},
    {},  # ends after three epochs by the verdict of a hook
]


@pytest.mark.parametrize("options", TRAINERS, ids=str)
@pytest.mark.filterwarnings("ignore:the tree stays as it is")
@pytest.mark.filterwarnings("ignore:the tuple miner with type_of_triplets")
def test_a_trainer_stopped_anywhere(tmp_path, options):
    expected = trained(tmp_path / "whole.pt", **options)
    path = tmp_path / "state.pt"
    # Of 6 iterations an epoch; the last two after a resumption. Loader processes take long to start.
    for stop in (7,) if options.get("workers") else (3, 7, 17):
        assert trained(path, stop, **options) is None
    for _ in range(2):  # the second time there is nothing left to do
        assert same(trained(path, **options), expected)
    assert expected["epoch"] == (4 if options else 3)


def test_the_hook_starts_no_workers_after_the_last_epoch(tmp_path):
    htl = make_htl(LABELS)
    trainer = make_trainer(htl, DATASET, CheckpointHook(tmp_path / "state.pt"), dataloader_num_workers=1)
    trainer.train(num_epochs=1)
    assert not hasattr(trainer.dataloader_iter, "_workers")
    assert len(list(islice(trainer.dataloader_iter, 2))) == 2


def test_another_training_does_not_resume(tmp_path):
    def make(lr=0.05, **kwargs):
        htl = make_htl(LABELS, **kwargs)
        hook = CheckpointHook(tmp_path / "state.pt", htl.refresh_hook(DATASET))
        return hook, make_trainer(htl, DATASET, hook, lr=lr)

    hook, trainer = make()
    assert hook.resume(trainer) == 1
    trainer.train(num_epochs=1)
    for change, message in [
        ({"num_levels": 8}, "loss_funcs.metric_loss does not take"),
        ({"num_anchors": 2}, "num_anchors=3"),
    ]:
        hook, trainer = make(**change)
        before = copy.deepcopy(trainer.models["trunk"].state_dict())
        with pytest.raises(ValueError, match=message):
            hook.resume(trainer)
        assert same(trainer.models["trunk"].state_dict(), before)


# The comparison


def test_files_of_a_run_become_what_they_were(tmp_path):
    files = RunFiles(tmp_path)
    kept = {"records/logs.db": b"records", "records/empty.csv": b"", "models/trunk_best1.pth": b"best"}
    for name, content in {**kept, "models/trunk_1.pth": b"last", "tensorboard/events": b"events"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    state = through_a_file(files.state_dict())
    assert state.keys() == kept.keys()
    (tmp_path / "records" / "logs.db").write_bytes(b"half")
    (tmp_path / "models" / "trunk_best1.pth").unlink()
    (tmp_path / "models" / "trunk_best2.pth").write_bytes(b"half")
    files.load_state_dict(state)
    found = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {**kept, "tensorboard/events": b"events"}


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_not_taken(tmp_path):
    plan = Plan(iterations=4, epoch_iterations=2, batch_size=32, embedding_size=16)
    contender = parse_contender("htl")
    expected = train(contender, 1, plan, few_classes(), tmp_path / "new")
    train(contender, 0, plan, few_classes(), tmp_path / "used")
    with pytest.warns(UserWarning, match=r"made with \{'seed': 0\}, but now it is \{'seed': 1\}.*begins anew"):
        outcome = train(contender, 1, plan, few_classes(), tmp_path / "used")
    assert outcome.accuracies == expected.accuracies
    again = train(contender, 1, plan, few_classes(), tmp_path / "used")  # killed before its outcome was written down
    assert again == replace(outcome, tree=again.tree) and same(again.tree.state_dict(), expected.tree.state_dict())


# Real kills


@pytest.mark.slow
def test_killed_processes_end_in_the_same_model(tmp_path):
    """The command behind the committed file, with two random kills and one in the middle of a write."""
    command = [sys.executable, "-m", "tests.kill_and_resume", "--trainings", "plain_loop", "--times", "2", "--places"]
    command += ["half-written", "--seed", str(time.time_ns() % 2**31), "--output", str(tmp_path / "resume.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((tmp_path / "resume.json").read_text())["runs"]
    assert [run["equal"] for run in runs] == [True] * 3 and all(run["kills"] for run in runs)
    assert runs[2]["kills"][0]["during"].startswith("save, half-written")


def test_the_committed_kills():
    document = json.loads((ROOT / "benchmarks" / "results" / "resume.json").read_text())
    assert len(document["metadata"]["commit"]) == 40  # known, and without changes
    for training in ("plain_loop", "pml_trainer", "comparison"):
        runs = [run for run in document["runs"] if run["training"] == training]
        assert sum(run["random"] for run in runs) >= 20 and len(runs) >= 20 + len(PLACES)
        assert all(run["equal"] and run["kills"] for run in runs)
