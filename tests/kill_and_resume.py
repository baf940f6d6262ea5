"""Trainings that are killed by SIGKILL, gone on with, and compared with one that was not.

    python -m tests.kill_and_resume --times 20 --output benchmarks/results/resume.json

Each training runs in a process of its own, which is killed after a random time, up to three times, and started again until
it ends. Beside those, some kill themselves where chance would seldom hit: in a refresh, with the checkpoint half-written,
and before and after it moves to its place. The file says when, and in what, each kill came, and whether all that the
training ends with is, bit for bit, what it would have been.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # before PML is imported

import numpy as np

# What optimizers and PML's records import when they are made, here once and not in every process.
import record_keeper  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard
from pytorch_metric_learning.testers import BaseTester
from torch.utils.data import DataLoader

from benchmarks.data import Splits, load
from benchmarks.methods.contenders import parse_contender
from benchmarks.outcomes.results import describe_session
from benchmarks.training.parallel import quiet
from benchmarks.training.train import Plan, train
from pml_htl import ClassTree, checkpoint, hooks
from pml_htl.checkpoint import Checkpoint, CheckpointHook

from .training import make_dataset, make_hooks, make_htl, make_models, make_trainer, training_steps

MAX_KILLS = 3  # of one training
PROCESSES = multiprocessing.get_context("fork")  # which need not import torch again


# The trainings. Each takes a folder, and returns all that must be the same.


def plain_loop(folder, steps=90, save_every=4):
    """In the middle of epochs, with a tree of the training batches."""
    dataset, models = make_dataset(), make_models()
    model = torch.nn.Sequential(*models.values())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    htl = make_htl(dataset.tensors[1], batches_per_epoch=15)
    refresh = htl.refresh_hook(None, mode="streaming")
    loader = DataLoader(dataset, batch_sampler=htl.sampler, generator=torch.Generator())
    parts = {"model": model, "optimizer": optimizer, "loss": htl.loss, "sampler": htl.sampler, "refresh": refresh}
    saved = Checkpoint(folder / "checkpoint.pt", **parts)
    done = (saved.load() or {"step": 0})["step"]
    for step in training_steps(parts, loader, done, steps):
        if step % len(loader) == 0:
            refresh.refresh()
        if step % save_every == 0:
            saved.save(step=step)
    assert htl.tree.is_fitted
    states = {name: part.state_dict() for name, part in parts.items()}
    return {**states, "refresh": {**states["refresh"], "seconds": None}, "random": torch.get_rng_state()}


def pml_trainer(folder, epochs=5, workers=2, **kwargs):
    """PML's trainer with hook container, tester and workers that draw ahead."""
    np.random.seed(0)
    dataset = make_dataset()
    htl = make_htl(dataset.tensors[1])
    container, _, test = make_hooks(dataset, folder, tensorboard=False)
    refresh = htl.refresh_hook(dataset, num_workers=0, then=test)
    hook = CheckpointHook(folder / "checkpoint.pt", refresh)
    trainer = make_trainer(
        htl,
        dataset,
        hook,
        dataloader_num_workers=workers,
        end_of_iteration_hook=container.end_of_iteration_hook,
        **kwargs,
    )
    trainer.train(hook.resume(trainer), epochs)
    parts = {**trainer.models, **trainer.optimizers, "loss": htl.loss, "sampler": htl.sampler}
    return {**{name: part.state_dict() for name, part in parts.items()}, "num_refreshes": refresh.num_refreshes}


def comparison(folder):
    """One training of `python -m benchmarks compare`, with its records, best models and test."""
    plan = Plan(iterations=8, epoch_iterations=2, batch_size=32, embedding_size=16)
    outcome = train(parse_contender("htl"), 0, plan, few_classes(), folder / "run")
    curve = [(step, accuracy) for step, accuracy, _ in outcome.curve]
    return {"accuracies": outcome.accuracies, "curve": curve, "tree": outcome.tree.state_dict()}


TRAININGS = {training.__name__: training for training in (plain_loop, pml_trainer, comparison)}
_few = None


def few_classes():
    """Twenty classes of each split of the glyphs."""
    global _few
    if _few is None:
        whole = load("glyphs")
        parts = []
        for images in (whole.train, whole.val, whole.test):
            kept = images.labels < images.labels.min() + 20
            parts.append(images.part(kept, images.labels[kept]))
        _few = Splits("few", *parts, whole.class_names)
    return _few


# Killing


class Phase:
    """What the training process is doing, in memory that outlives it."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 256)
        self.saves = 0
        self.enter("start")

    def enter(self, name):
        self.name = name
        self.memory[:] = f"{name}, {self.saves} saves after its start".encode().ljust(256)

    def __str__(self):
        return self.memory[:].decode().strip()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def watch(owner, name, phase, label, before=None):
    """Lets a function say that it is running."""
    function = getattr(owner, name)

    def watched(*args, **kwargs):
        outer = phase.name
        phase.enter(label)
        if before is not None:
            before()
        result = function(*args, **kwargs)
        phase.saves += label == "save"
        phase.enter(outer)
        return result

    setattr(owner, name, watched)


def kill_inside(place, occurrence, phase):
    """Makes this process kill itself at the n-th time that it is at a place."""
    calls = 0

    def is_time():
        nonlocal calls
        calls += 1
        return calls == occurrence

    system = types.SimpleNamespace(**vars(os))  # for this module alone
    checkpoint.os = system

    def half_written(descriptor):
        if os.path.realpath(f"/proc/self/fd/{descriptor}").endswith(".partial") and is_time():
            os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
            phase.enter("save, half-written")
            die()
        os.fsync(descriptor)

    def moved(source, target):
        due = is_time()
        if due and place == "before the move":
            phase.enter("save, before the move")
            die()
        os.replace(source, target)
        if due:
            phase.enter("save, after the move")
            die()

    if place == "half-written":
        system.fsync = half_written
    elif place == "refresh":
        watch(ClassTree, "fit", phase, "refresh", before=lambda: die() if is_time() else None)
    else:
        system.replace = moved


PLACES = ("refresh", "half-written", "before the move", "after the move")


def work(name, folder, phase, inside):
    """What a training process does."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    quiet()
    warnings.simplefilter("ignore", UserWarning)
    phase.enter("training")
    watch(Checkpoint, "save", phase, "save")
    watch(hooks, "collect_statistics", phase, "refresh")
    watch(BaseTester, "test", phase, "test")
    if inside is not None:
        kill_inside(*inside, phase)
    folder.mkdir(exist_ok=True)
    result = TRAININGS[name](folder)
    torch.save(result, folder / "final.partial")
    os.replace(folder / "final.partial", folder / "final.pt")


def run(name, folder, delays=(), inside=None):
    """A training until its end, with its kills: after each delay, or where it kills itself in its first process."""
    kills = []
    for delay in (*delays, None):
        phase = Phase()
        process = PROCESSES.Process(target=work, args=(name, folder, phase, None if kills else inside))
        process.start()
        process.join(delay)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            kills.append({"after_seconds": delay, "during": str(phase)})
            if inside is not None:
                return kills + run(name, folder)
        elif process.exitcode != 0:
            raise RuntimeError(f"the training {name} failed in {folder}")
        else:
            break
    return kills


def same(one, other):
    """Whether two states are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def final(folder):
    return torch.load(folder / "final.pt", weights_only=True)


def kill_all(names, times, places, seed, report):
    """The entries of all runs: `times` with random kills of each training, and one for each place."""
    generator, entries = np.random.default_rng(seed), []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="pml-htl-kill-") as root:
            root = Path(root)
            start = time.perf_counter()
            run(name, root / "undisturbed")
            duration = time.perf_counter() - start
            expected = final(root / "undisturbed")
            plans = [{"inside": (place, int(generator.integers(1, 4)))} for place in places]
            number = 0
            while number < times + len(places):
                plan = plans[number - times] if number >= times else {}
                if not plan:
                    plan = {"delays": [round(delay, 3) for delay in generator.uniform(0, duration, MAX_KILLS).tolist()]}
                folder = root / str(len(entries))
                kills = run(name, folder, **plan)
                if not kills:  # it was faster than the undisturbed one
                    (folder / "final.pt").unlink()
                    folder.rename(root / f"unkilled-{time.perf_counter_ns()}")
                    continue
                number += 1
                found = {
                    "training": name,
                    "random": "delays" in plan,
                    "seconds_undisturbed": round(duration, 3),
                    "kills": kills,
                    "equal": same(final(folder), expected),
                }
                entries.append(found)
                report(json.dumps(found), flush=True)
    return entries


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="runs with random kills of each training")
    parser.add_argument("--trainings", nargs="*", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--places", nargs="*", choices=PLACES, default=list(PLACES), help="where to kill for certain")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if "comparison" in options.trainings:
        few_classes()  # once, for all processes
    command = " ".join(["python -m tests.kill_and_resume", *(sys.argv[1:] if arguments is None else arguments)])
    document = {"metadata": {**describe_session("cpu"), "command": command, "seed": options.seed}}
    document["runs"] = kill_all(options.trainings, options.times, options.places, options.seed, print)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    equal = sum(entry["equal"] for entry in document["runs"])
    print(f"{equal} of {len(document['runs'])} end in the same model")
    return 0 if equal == len(document["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
