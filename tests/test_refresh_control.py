"""When a refresh comes, on how many samples, with which workers, and that it leaves no trace."""

import pickle
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pml_htl import ClassTree, TreeRefresh
from pml_htl.refreshing import progress
from pml_htl.refreshing.embedding import subset_per_class

from .processes import environment
from .training import NUM_CLASSES, embed, make_dataset, make_htl, make_trainer, same_tree

DATASET = make_dataset()
INPUTS, LABELS = DATASET.tensors


def iterations_of_refreshes(num_epochs, start_epoch=1, **kwargs):
    """After how many iterations in all (of 6 an epoch) the tree was new."""
    htl, found = make_htl(LABELS), []

    def note(trainer):
        if htl.tree.is_fitted and htl.tree.nodes is not getattr(note, "nodes", None):
            note.nodes = htl.tree.nodes
            found.append(trainer.get_global_iteration() + 1)

    hook = htl.refresh_hook(DATASET, then_each_iteration=note, then=note, **kwargs)
    trainer = make_trainer(htl, DATASET, hook, end_of_iteration_hook=hook.end_of_iteration_hook)
    trainer.train(start_epoch, num_epochs)
    return found


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"every_n_iterations": 4}, [6, 10, 14, 18]),
        ({"every_n_iterations": 4, "warmup_epochs": 0}, [4, 8, 12, 16]),
        ({"every_n_iterations": 7, "warmup_epochs": 2}, [12]),
        ({"every_n_iterations": 100}, [6]),
        ({"every_n_epochs": 2}, [6, 18]),
    ],
    ids=str,
)
def test_every_n_iterations_counts_from_the_end_of_the_warmup(options, expected):
    assert iterations_of_refreshes(3, **options) == expected


def test_a_resumed_training_goes_on_counting():
    assert iterations_of_refreshes(3, start_epoch=2, every_n_iterations=4) == [10, 14, 18]


@pytest.mark.parametrize("delay, rank, is_shown", [(0, 0, True), (60, 0, False), (0, 1, False)])
def test_a_long_pass_shows_how_far_it_is_on_the_first_process(delay, rank, is_shown, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", delay)
    loader = DataLoader(DATASET, batch_size=36)
    assert len(list(progress.with_progress(loader, SimpleNamespace(rank=rank)))) == 4
    shown = capsys.readouterr().err
    assert ("refresh of the class tree: 100%" in shown and "4/4" in shown) == is_shown and (is_shown or not shown)


def test_a_refresh_shows_it(monkeypatch, capsys):
    for delay, is_shown in ((60, False), (0, True)):
        monkeypatch.setattr(progress, "DELAY", delay)
        make_htl(LABELS).refresh_hook(DATASET, batch_size=36).refresh(torch.nn.Linear(INPUTS.shape[1], 8))
        assert ("refresh of the class tree: 100%" in capsys.readouterr().err) == is_shown


@pytest.mark.parametrize("workers", [0, 2])
def test_within_an_epoch_the_next_batch_is_of_the_new_tree(workers):
    htl = make_htl(LABELS)
    hook = htl.refresh_hook(DATASET, warmup_epochs=0, every_n_iterations=3)
    trainer = make_trainer(
        htl, DATASET, hook, end_of_iteration_hook=hook.end_of_iteration_hook, dataloader_num_workers=workers
    )
    groups, get_batch = [], trainer.get_batch

    def recording():
        data, labels = get_batch()
        groups.append((labels.reshape(3, 3, 2)[:, :, 0].tolist(), htl.tree.nearest_classes is not None))
        if htl.tree.is_fitted:  # the anchor's neighbours are its nearest, but for what stands in the batch before
            taken = set()
            for anchor, *neighbors in groups[-1][0]:
                nearest = [x for x in htl.tree.neighbors(anchor, NUM_CLASSES - 1).tolist() if x not in taken]
                assert neighbors == nearest[:2]
                taken |= {anchor, *neighbors}
        return data, labels

    trainer.get_batch = recording
    trainer.train(num_epochs=2)
    assert [fitted for _, fitted in groups] == [False] * 3 + [True] * 9


def test_every_n_iterations_without_the_iteration_hook_is_refused():
    htl = make_htl(LABELS)
    hook = htl.refresh_hook(DATASET, every_n_iterations=2)
    with pytest.raises(ValueError, match=r"end_of_iteration_hook=refresh\.end_of_iteration_hook"):
        make_trainer(htl, DATASET, hook).train(num_epochs=1)
    with pytest.raises(ValueError, match="not both"):
        htl.refresh_hook(DATASET, every_n_iterations=2, every_n_epochs=2)
    with pytest.raises(TypeError, match="then_each_iteration"):
        htl.refresh_hook(DATASET, then_each_iteration=3)
    for name, value in {"every_n_iterations": 0, "samples_per_class": 1, "seed": -1}.items():
        with pytest.raises(ValueError, match=name):
            htl.refresh_hook(DATASET, **{name: value})


# Fewer samples


class Counting(TensorDataset):
    """Notes which samples were read."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def test_samples_per_class_caps_every_class_and_changes_its_choice():
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))[:-5]  # uneven classes, mixed
    dataset = Counting(INPUTS[order], LABELS[order])
    htl = make_htl(LABELS[order])
    hook = htl.refresh_hook(dataset, samples_per_class=4, seed=3)
    trainer = make_trainer(htl, TensorDataset(*dataset.tensors))
    choices = []
    for _ in range(2):
        dataset.read.clear()
        hook.refresh(torch.nn.Sequential(trainer.models["trunk"], trainer.models["embedder"]))
        choices.append(sorted(dataset.read))
        counts = torch.bincount((dataset.tensors[1][choices[-1]] + 7) // 3)
        assert counts.tolist() == torch.bincount((dataset.tensors[1] + 7) // 3).clamp(max=4).tolist()
        chosen = ClassTree().fit_embeddings(embed(trainer, dataset.tensors[0][choices[-1]]), dataset.tensors[1][choices[-1]])
        assert same_tree(htl.tree, chosen)
    assert choices[0] != choices[1]
    again = subset_per_class(dataset, dataset.tensors[1].numpy(), 4, np.random.default_rng([3, 1]))
    assert again.indices == choices[1]  # the same seed, the same choice


def test_samples_per_class_takes_the_labels_of_our_sampler_or_asks_for_them():
    htl = make_htl(LABELS)
    dataset = Counting(INPUTS, LABELS)
    TreeRefresh(htl.tree, dataset, samples_per_class=3)(trainer_after_an_epoch(htl))
    assert len(dataset.read) == 3 * NUM_CLASSES

    sampler = MPerClassSampler(LABELS, 2, 18, 18 * 20)
    hook = TreeRefresh(ClassTree(), DATASET, samples_per_class=3)
    with pytest.raises(ValueError, match="labels of the 144 samples of the data set, but none were given"):
        hook(trainer_after_an_epoch(htl, sampler=sampler))
    with pytest.raises(ValueError, match="but there are 143"):
        TreeRefresh(ClassTree(), DATASET, samples_per_class=3, labels=LABELS[1:]).refresh(torch.nn.Identity())


def trainer_after_an_epoch(htl, **kwargs):
    trainer = make_trainer(htl, DATASET, **kwargs)
    trainer.epoch, trainer.iteration = 1, 5
    return trainer


# No trace


class Augmented(Dataset):
    """Draws from every global generator there is."""

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return INPUTS[index] + 0.01 * noise, LABELS[index]


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("workers", [0, 1])
def test_all_random_states_are_as_before_also_after_a_failure(workers):
    htl = make_htl(LABELS)
    trainer = trainer_after_an_epoch(htl)
    nan = TensorDataset(INPUTS * torch.nan, LABELS)
    for dataset in (Augmented(), nan):
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        expected = draws()
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        try:
            htl.refresh_hook(dataset, num_workers=workers)(trainer)
        except ValueError as error:
            assert "NaN" in str(error)
        assert draws() == expected
    random.seed(1)
    hook = htl.refresh_hook(Augmented(), num_workers=workers)
    hook.refresh(torch.nn.Linear(10, 4))
    assert random.random() == expected[0]


# Workers


class PersistentWorkers(MetricLossOnly):
    """A trainer whose workers outlive their epoch."""

    def initialize_dataloader(self):
        super().initialize_dataloader()
        self.dataloader = DataLoader(
            self.dataset, batch_sampler=self.sampler, num_workers=2, persistent_workers=True, prefetch_factor=3
        )
        self.dataloader_iter = iter(self.dataloader)


def test_persistent_workers_bring_no_batches_of_the_old_tree():
    htl = make_htl(LABELS)
    hook = htl.refresh_hook(DATASET, num_workers=0)
    trainer = make_trainer(htl, DATASET, hook, PersistentWorkers)
    get_batch = trainer.get_batch

    def checked():
        data, labels = get_batch()
        if htl.tree.is_fitted:
            anchor, *neighbors = labels.reshape(3, 3, 2)[0, :, 0].tolist()
            assert neighbors == htl.tree.neighbors(anchor, 2).tolist()
        return data, labels

    trainer.get_batch = checked
    trainer.train(num_epochs=4)
    assert hook.num_refreshes == 4
    trainer.dataloader._iterator._shutdown_workers()


@pytest.mark.slow
def test_the_spawn_start_method(tmp_path):
    """In a process of its own, as on macOS and Windows: data set and collate function are pickled for the workers.

    The tensors of a pickled data set move to shared memory, also the labels that the sampler was made from.
    """
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from tests.training import make_dataset, make_htl, make_trainer\n"
        "if __name__ == '__main__':\n"
        "    torch.multiprocessing.set_start_method('spawn')\n"
        "    dataset = make_dataset()\n"
        "    htl = make_htl(dataset.tensors[1])\n"
        "    hook = htl.refresh_hook(dataset)\n"
        "    make_trainer(htl, dataset, hook, dataloader_num_workers=1, iterations_per_epoch=2).train(num_epochs=1)\n"
        "    print('refreshes', hook.num_refreshes)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment(), timeout=300)
    assert "refreshes 1" in done.stdout, done.stderr


def test_all_parts_can_be_pickled_for_spawned_processes():
    htl = make_htl(LABELS)
    htl.tree.fit_embeddings(INPUTS, LABELS)
    expected = htl.loss(INPUTS, LABELS)
    copied = pickle.loads(pickle.dumps(htl))
    assert same_tree(copied.tree, htl.tree) and copied.miner.tree is copied.tree is copied.sampler.tree
    assert copied.loss(INPUTS, LABELS) == expected
    assert next(iter(copied.sampler)) == next(iter(htl.sampler))


def test_a_loader_whose_sampler_does_not_have_the_tree_goes_on():
    """Otherwise a shuffled epoch would begin anew after each refresh, and some samples would never be seen."""
    seen = []

    class Watched(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    htl = make_htl(LABELS)
    hook = TreeRefresh(htl.tree, DATASET, every_n_iterations=1, warmup_epochs=0, num_workers=0)
    trainer = make_trainer(
        htl,
        Watched(INPUTS, LABELS),
        hook,
        sampler=None,
        iterations_per_epoch=None,
        end_of_iteration_hook=hook.end_of_iteration_hook,
    )
    hook.num_refreshes = 1  # the first one looks at some samples
    trainer.train(num_epochs=1)
    assert hook.num_refreshes == 1 + len(LABELS) // htl.batch_size == 1 + trainer.iterations_per_epoch
    assert len(seen) == len(set(seen)) == len(LABELS) // htl.batch_size * htl.batch_size


class Merging(torch.nn.Linear):
    """As LoRA layers do, it has two forms of its weights and changes between them with its mode."""

    def train(self, mode=True):
        self.weight.requires_grad_(mode)
        return super().train(mode)


def test_modules_that_do_more_when_their_mode_changes_are_back():
    model = torch.nn.Sequential(Merging(10, 4), torch.nn.Dropout().eval())
    TreeRefresh(ClassTree(), DATASET).refresh(model)
    assert model[0].weight.requires_grad and model[0].training and not model[1].training


def test_a_picture_that_cannot_be_written_comes_after_all_else():
    class Full:
        def add_figure(self, *args, **kwargs):
            raise OSError("disk full")

        add_text = add_embedding = add_figure

    htl = make_htl(LABELS)
    hook = htl.refresh_hook(DATASET, tensorboard_writer=Full(), warmup_epochs=0)
    trainer = make_trainer(htl, DATASET, hook)
    trainer.initialize_dataloader()
    iterator = trainer.dataloader_iter
    with pytest.raises(OSError, match="disk full"):
        hook.before_training(trainer)
    assert htl.tree.is_fitted and hook.num_refreshes == 1 and trainer.dataloader_iter is not iterator


# In a plain loop


def test_a_plain_loop_compares_the_labels_with_those_given():
    with pytest.raises(ValueError, match="the refresh was given has 24: the refresh was given lacks"):
        make_htl(LABELS + 1).refresh_hook(DATASET).refresh(torch.nn.Linear(10, 4))


def test_a_plain_loop_has_its_getter_collate_function_and_dtype():
    model = torch.nn.Linear(10, 4).double()
    tree = ClassTree()
    TreeRefresh(tree, DATASET).refresh(
        model,
        dtype=torch.float64,
        collate_fn=lambda samples: {"x": torch.stack([x for x, _ in samples]), "y": [int(y) for _, y in samples]},
        data_and_label_getter=lambda batch: (batch["x"], batch["y"]),
    )
    assert same_tree(tree, ClassTree().fit_embeddings(model(INPUTS.double()), LABELS))
