"""What comes from outside: a worker that dies, Ctrl-C at any moment, a full disk. The tree in use stays a whole one."""

import contextlib
import copy
import errno
import functools
import resource
import signal
import sqlite3
import time

import pytest
import torch
from pytorch_metric_learning.utils.common_functions import list_of_recordable_attributes_list_names
from pytorch_metric_learning.utils.logging_presets import get_hook_container
from record_keeper import RecordKeeper, RecordWriter

from pml_htl import ClassStatistics, ClassTree

from ..training import make_dataset, make_htl, make_trainer
from .refresh_machine import Failing
from .tree_machine import samples

DATASET = make_dataset()
DATA, LABELS = DATASET.tensors


def assert_whole(tree):
    """Everything that is derived from the state belongs to the state."""
    loaded = ClassTree(tree.num_levels)
    loaded.load_state_dict(tree.state_dict())
    a, b = tree.labels.unsqueeze(1), tree.labels
    assert loaded.d_0 == tree.d_0 and loaded.nodes_at_level_0 == tree.nodes_at_level_0
    assert torch.equal(loaded.merge_levels(a, b), tree.merge_levels(a, b))
    assert torch.equal(loaded.cophenetic_distances(a, b), tree.cophenetic_distances(a, b))


def test_a_data_set_that_raises_in_a_worker():
    htl = make_htl(LABELS)
    htl.tree.fit_embeddings(DATA, LABELS)
    before = copy.deepcopy(htl.tree.state_dict())
    model = torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.Dropout())
    broken = Failing(OSError(errno.EIO, "the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone"):
        htl.refresh_hook(broken, batch_size=16, num_workers=2).refresh(model)
    assert all(torch.equal(before[name], value) for name, value in htl.tree.state_dict().items())
    assert all(module.training for module in model.modules())
    htl.refresh_hook(DATASET, batch_size=16, num_workers=2).refresh(model)  # and it goes on
    assert not torch.equal(before["spreads"], htl.tree.spreads)


def pressed_during(call, seconds):
    """Whether Ctrl-C came during a call: a signal after so many seconds, handled between any two steps of Python."""
    waiting = True

    def press(*_):
        if waiting:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
        waiting = False
    except KeyboardInterrupt:
        return True
    finally:
        waiting = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


def random_moments(call, number):
    """Times that spread over a call and somewhat beyond."""
    times = []
    for _ in range(10):  # some of them the machine may do other things
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return (1e-6 + 1.2 * min(times) * torch.rand(number, generator=torch.Generator().manual_seed(0))).tolist()


def test_ctrl_c_at_any_moment_of_a_fit():
    tree, pressed = ClassTree(5), []
    statistics = [ClassStatistics(labels, 3).update(x, labels) for x, labels in (samples(0), samples(1))]
    trees = [ClassTree(5).fit(each).state_dict() for each in statistics]
    for turn, seconds in enumerate(random_moments(lambda: tree.fit(statistics[0]), 200), 1):
        if pressed_during(functools.partial(tree.fit, statistics[turn % 2]), seconds):
            pressed.append(seconds)
        which = next(place for place in (0, 1) if torch.equal(tree.spreads, trees[place]["spreads"]))
        assert all(torch.equal(trees[which][name], value) for name, value in tree.state_dict().items())
        assert_whole(tree)
        assert torch.is_grad_enabled()
    assert len(pressed) > 50


def test_ctrl_c_at_any_moment_of_a_refresh():
    """Neither tree is a mixture, and modes, gradients and random states are as before."""
    htl, pressed = make_htl(LABELS), []
    model = torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.Dropout(), torch.nn.Dropout().eval())
    hook = htl.refresh_hook(DATASET, batch_size=32)
    for seconds in random_moments(lambda: hook.refresh(model), 100):
        torch.nn.init.normal_(model[0].weight)
        before, random_state = htl.tree.state_dict(), torch.get_rng_state()
        if pressed_during(lambda: hook.refresh(model), seconds):
            pressed.append(seconds)
        after = htl.tree.state_dict()
        assert len({torch.equal(before[name], after[name]) for name in ("spreads", "merge_heights", "thresholds")}) == 1
        assert_whole(htl.tree)
        assert torch.is_grad_enabled() and torch.equal(random_state, torch.get_rng_state())
        assert [module.training for module in model.modules()] == [True, True, True, False]
    assert len(pressed) > 20
    hook.refresh(model)  # and it goes on
    assert htl.loss(DATA, LABELS) >= 0


@contextlib.contextmanager
def full_disk(free):
    """No file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "what, free, error, message",
    [
        ("records", 10, OSError, "File too large"),  # the tables
        ("records", 3000, sqlite3.OperationalError, "disk"),  # the database, which is larger
        ("tree", 1000, (OSError, RuntimeError), "unexpected pos|writ"),  # as torch says it
    ],
    ids=["tables", "database", "tree"],
)
def test_a_full_disk_under_the_records(what, free, error, message, tmp_path):
    """The cause goes on to the caller, the tree is the new one and whole, and the training goes on when there is room."""
    htl = make_htl(LABELS)
    attributes = list_of_recordable_attributes_list_names()
    keeper = RecordKeeper(record_writer=RecordWriter(str(tmp_path / "records")), attributes_to_search_for=attributes)
    container = get_hook_container(keeper, log_freq=1)

    def save(trainer):
        with full_disk(free) if trainer.epoch == 2 else contextlib.nullcontext():
            if what == "records":
                keeper.save_records()
            else:
                torch.save(htl.loss.state_dict(), tmp_path / "loss.pth")

    hook = htl.refresh_hook(DATASET, then=save)
    each_iteration = container.end_of_iteration_hook
    trainer = make_trainer(htl, DATASET, hook, end_of_iteration_hook=each_iteration, iterations_per_epoch=2)
    trainer.train(1, 1)
    before = copy.deepcopy(htl.tree.state_dict())
    with pytest.raises(error, match=message):
        trainer.train(2, 2)
    assert hook.num_refreshes == 2 and not torch.equal(before["spreads"], htl.tree.spreads)
    assert_whole(htl.tree)
    trainer.train(3, 3)
    assert hook.num_refreshes == 3
    if what == "tree":
        restored = make_htl(LABELS)
        restored.loss.load_state_dict(torch.load(tmp_path / "loss.pth", weights_only=True))
        assert torch.equal(restored.tree.spreads, htl.tree.spreads)
    else:
        tables = sqlite3.connect(tmp_path / "records" / "logs.db").execute("SELECT name FROM sqlite_master").fetchall()
        assert any(name.endswith("ClassTree") for (name,) in tables)
