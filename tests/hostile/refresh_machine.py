"""`TreeRefresh` in a plain loop, in a PML trainer and streaming: whatever fails, the tree in use is a whole one."""

import errno
import random

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from torch.utils.data import TensorDataset

from pml_htl import ClassTree, TreeRefresh
from pml_htl.tree.state import NAMES

from ..training import NUM_CLASSES, PER_CLASS, make_dataset, make_htl, make_models, make_trainer
from .inputs import BAD_EMBEDDINGS, BAD_LABELS, NOT_FINITE, UNKNOWN
from .machine import Hostile, same

DATASET = make_dataset()
DATA, LABELS = DATASET.tensors
LAST = int(LABELS[-1])
SEEDS = st.integers(0, 2**16)
FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


class Failing(TensorDataset):
    """Raises in the middle of a pass."""

    def __init__(self, error):
        super().__init__(DATA, LABELS)
        self.error = error

    def __getitem__(self, index):
        if index == 100:
            raise self.error
        return super().__getitem__(index)


class Given(torch.nn.Module):
    """A model that makes something else of its embeddings, or raises."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, inputs):
        return self.change(self.model(inputs))


def raises(error):
    def change(_):
        raise error

    return change


BAD_DATASETS = {
    "raises": (Failing(RuntimeError("a broken image")), (RuntimeError, "a broken image")),
    "Ctrl-C": (Failing(KeyboardInterrupt("pressed")), (KeyboardInterrupt, "pressed")),
    "full disk": (Failing(FULL_DISK), (OSError, "No space left")),
    "a class has vanished": (
        TensorDataset(DATA[:-PER_CLASS], LABELS[:-PER_CLASS]), (ValueError, f"the data set lacks label {LAST}")
    ),
    "of another data set": (TensorDataset(DATA, LABELS + UNKNOWN), (ValueError, r"24 classes.*lacks labels \d{6,}")),
    "one class": (TensorDataset(DATA, LABELS * 0), (ValueError, "has 1 classes.*lacks label")),
    "single samples": (TensorDataset(DATA[::PER_CLASS], LABELS[::PER_CLASS]), (ValueError, "single sample")),
    "empty": (TensorDataset(DATA[:0], LABELS[:0]), (ValueError, "data set of the refresh is empty")),
    "NaN": (TensorDataset(DATA * torch.nan, LABELS), (ValueError, "144 of 144 embeddings are NaN or infinite")),
    "float labels": (TensorDataset(DATA, LABELS.double()), (TypeError, "labels must be integers.*float64")),
    "boolean labels": (TensorDataset(DATA, LABELS > 0), (TypeError, "labels must be integers.*bool")),
    "2-D labels": (TensorDataset(DATA, LABELS.unsqueeze(1)), (ValueError, r"labels of a batch are of shape \(64, 1\)")),
}  # fmt: skip
LEGITIMATE_IN_A_TRAINER = {"2-D labels"}  # of which it takes a level
NO_PAIRS = {
    "inputs alone": (TensorDataset(DATA), (ValueError, "is 1 parts, but must be a pair")),
    "a third part": (TensorDataset(DATA, LABELS, LABELS), (ValueError, "is 3 parts, but must be a pair")),
    "a tensor": (DATA, (ValueError, "is a Tensor, but must be a pair")),
    "dictionaries": ([{"x": x, "y": int(y)} for x, y in DATASET], (ValueError, "is a dict, but must be a pair")),
}
MODEL_MAKES = (TypeError, "embeddings that the model makes must be a tensor of floats")
MODEL_SHAPES = (ValueError, r"embeddings that the model makes must be of shape \(B, D\)")
BAD_MODELS = {
    "Ctrl-C": (raises(KeyboardInterrupt("pressed")), (KeyboardInterrupt, "pressed")),
    "raises": (raises(MemoryError("out of memory")), (MemoryError, "out of memory")),
    "NaN": (lambda x: x * torch.nan, (ValueError, "NaN or infinite")),
    "nothing": (lambda x: None, MODEL_MAKES),
    "a pair": (lambda x: (x, x), MODEL_MAKES),
    "an array": (lambda x: x.numpy(), MODEL_MAKES),
    "integers": (lambda x: x.long(), MODEL_MAKES),
    "complex": (lambda x: x + 0j, MODEL_MAKES),
    "1-D": (lambda x: x[:, 0], MODEL_SHAPES),
    "3-D": (lambda x: x.unsqueeze(1), MODEL_SHAPES),
    "0-D": (lambda x: x.sum(), MODEL_SHAPES),
    "one too few": (lambda x: x[1:], (ValueError, "one label per embedding: 63")),
    "no columns": (lambda x: x[:, :0], (ValueError, "embedding_size must be")),
}
BAD_ARGUMENTS = [
    ("tree", [None, 3, "tree"], "tree must be a ClassTree"),
    ("dataset", [None, 3, object()], "dataset"),
    ("labels", [["a"], [0.5], 3, [[1], [2]], [[1], [2, 3]]], "labels must be"),
    *(
        (name, [-1, 0.5, "a", True], name)
        for name in ("warmup_epochs", "every_n_epochs", "batch_size", "num_workers", "seed")
    ),
    *((name, [0, 0.5, "a", True], name) for name in ("every_n_epochs", "every_n_iterations", "samples_per_class")),
    ("mode", ["half", None, 3], "mode must be full or streaming"),
    *((name, [3, "hook"], name) for name in ("then", "then_each_iteration", "tensorboard_writer")),
]
BAD_STREAMING = [
    ("loss", [3, "loss", None], "loss"),
    ("labels", [None, [], ["a"], [0.5], 3], "label|empty"),
    ("forget", [0, -1, 2, "a", None, np.nan], r"forget must be in \(0, 1\]"),
    ("samples_per_class", [2], "samples_per_class"),
]


class RefreshMachine(Hostile):
    @initialize(streaming=st.booleans())
    def begin(self, streaming):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        self.htl = make_htl(LABELS)
        models = make_models()
        self.model = torch.nn.Sequential(*models.values())
        self.model[0][1].eval()  # frozen
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self.hook = self.htl.refresh_hook(None if streaming else DATASET, mode="streaming" if streaming else "full")
        self.trainer = make_trainer(self.htl, DATASET, self.hook, models=models, iterations_per_epoch=2)
        self.streaming = streaming

    def snapshot(self):
        tree = {name: getattr(self.htl.tree, name) for name in NAMES}
        watch = self.hook.watch
        return {
            "tree": {name: value if value is None else value.clone() for name, value in tree.items()},
            "derived": (self.htl.tree.d_0, self.htl.tree._num_divided_levels),
            "modes": [module.training for module in self.model.modules()],
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "weights": [parameter.detach().clone() for parameter in self.model.state_dict().values()],
            "watched": None if watch is None else len(watch._buffer),
            "refreshes": self.hook.num_refreshes,
        }

    def samples(self, seed, size=8):
        index = torch.randint(len(LABELS), (size,), generator=torch.Generator().manual_seed(seed))
        return DATA[index], LABELS[index]

    # In a plain loop

    @rule()
    def refresh(self):
        before = self.snapshot()
        self.attempt("refresh", lambda: self.hook.refresh(self.model))
        after = self.snapshot()
        assert all(same(before[part], after[part]) for part in ("modes", "random", "weights"))
        if not self.streaming:
            assert self.hook.num_refreshes == before["refreshes"] + 1
            modes = [(module, module.training) for module in self.model.modules()]
            with torch.no_grad():
                expected = ClassTree().fit_embeddings(self.model.eval()(DATA), LABELS)
            for module, training in modes:
                module.training = training
            assert torch.equal(self.htl.tree.nodes, expected.nodes)
            torch.testing.assert_close(self.htl.tree.spreads, expected.spreads)

    @rule(kind=st.sampled_from(sorted(BAD_DATASETS)))
    def refresh_from_a_bad_dataset(self, kind):
        dataset, refusal = BAD_DATASETS[kind]
        hook = TreeRefresh(self.htl.tree, dataset, labels=LABELS)
        if kind == "single samples":
            hook = TreeRefresh(self.htl.tree, dataset)
        self.attempt("refresh", lambda: hook.refresh(self.model), refusal)
        assert hook.num_refreshes == 0

    @rule(kind=st.sampled_from(sorted(NO_PAIRS)))
    def refresh_from_no_pairs(self, kind):
        dataset, refusal = NO_PAIRS[kind]
        self.attempt("refresh", lambda: TreeRefresh(self.htl.tree, dataset).refresh(self.model), refusal)

    @rule(kind=st.sampled_from(sorted(BAD_MODELS)))
    def refresh_with_a_bad_model(self, kind):
        change, refusal = BAD_MODELS[kind]
        hook = TreeRefresh(self.htl.tree, DATASET)
        self.attempt("refresh", lambda: hook.refresh(Given(self.model, change)), refusal)

    @rule(model=st.sampled_from([3, "model", len, ()]))
    def refresh_with_no_model(self, model):
        refusal = (TypeError, "model must be a torch module")
        self.attempt("refresh", lambda: TreeRefresh(self.htl.tree, DATASET).refresh(model), refusal)

    @rule(line=st.integers(1, 400))
    def refresh_with_ctrl_c(self, line):
        hook = TreeRefresh(self.htl.tree, DATASET, labels=LABELS)
        self.interrupted("refresh", lambda: hook.refresh(self.model), line)
        for module in self.model.modules():  # Ctrl-C may come while they are being restored
            module.train()
        self.model[0][1].eval()

    # In a trainer

    @rule()
    def train(self):
        before = self.hook.num_refreshes
        self.trainer.epoch = 1
        self.trainer.end_of_epoch_hook = self.hook
        self.attempt("trainer.train", lambda: self.trainer.train(1, 1))
        assert self.hook.num_refreshes == before + 1 or self.streaming

    @rule(kind=st.sampled_from(sorted(set(BAD_DATASETS) - LEGITIMATE_IN_A_TRAINER)))
    def train_with_a_bad_dataset(self, kind):
        dataset, refusal = BAD_DATASETS[kind]
        self.trainer.epoch = 1
        hook = self.htl.refresh_hook(dataset)
        self.attempt("refresh in a trainer", lambda: hook(self.trainer), refusal)

    @rule(error=st.sampled_from([FULL_DISK, KeyboardInterrupt("pressed"), ValueError("no such record")]))
    def records_that_fail(self, error):
        """The refresh is over then: the tree is the new one, and whole; the cause goes on to the caller."""
        hook = self.htl.refresh_hook(DATASET, then=raises(error))
        self.trainer.epoch = 1
        try:
            hook(self.trainer)
        except BaseException as found:
            assert found is error
        assert hook.num_refreshes == 1 and self.htl.tree.is_fitted

    # Streaming

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(BAD_LABELS)))
    def a_batch_with_bad_labels(self, seed, kind):
        inputs, labels = self.samples(seed)
        spoil, refusal = BAD_LABELS[kind]
        if "another data set" in kind and not (self.streaming or self.htl.tree.is_fitted):  # nobody can know
            return
        embeddings = inputs[:, :8].clone().requires_grad_()
        self.attempt("loss", lambda: self.htl.loss(embeddings, spoil(labels)), refusal)

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(BAD_EMBEDDINGS)))
    def a_batch_with_bad_embeddings(self, seed, kind):
        inputs, labels = self.samples(seed)
        spoil, refusal = BAD_EMBEDDINGS[kind]
        spoilt = spoil(inputs[:, :8] * torch.ones(8))
        if isinstance(spoilt, torch.Tensor) and (spoilt.is_floating_point() or spoilt.is_complex()):
            spoilt = spoilt.requires_grad_()
        self.attempt("loss", lambda: self.htl.loss(spoilt, labels), refusal)

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(NOT_FINITE)))
    def a_batch_that_is_not_finite(self, seed, kind):
        inputs, labels = self.samples(seed)
        embeddings = torch.full((len(inputs), 8), NOT_FINITE[kind], requires_grad=True)
        if self.hook.watch is None or self.hook.watch._num_broken + len(self.hook.watch._buffer) < 14:
            self.attempt("loss", lambda: self.htl.loss(embeddings, labels))

    @rule(seed=SEEDS)
    def a_step(self, seed):
        inputs, labels = self.samples(seed, size=len(LABELS))
        loss = self.attempt("loss", lambda: self.htl.loss(self.model(inputs), labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @rule()
    def another_embedding_size(self):
        if self.streaming and self.hook.watch.embedding_size is not None:
            other = torch.ones(4, self.hook.watch.embedding_size + 1, requires_grad=True)
            refusal = (ValueError, r"embeddings must be of shape \(B, 8\), but they are \(4, 9\)")
            self.attempt("loss", lambda: self.htl.loss(other, LABELS[:4]), refusal)

    # Arguments

    @rule(data=st.data())
    def bad_arguments(self, data):
        name, values, message = data.draw(st.sampled_from(BAD_ARGUMENTS))
        arguments = {"tree": self.htl.tree, "dataset": DATASET, name: data.draw(st.sampled_from(values))}
        self.attempt("TreeRefresh", lambda: TreeRefresh(**arguments), ((ValueError, TypeError), message))

    @rule(data=st.data())
    def bad_streaming_arguments(self, data):
        name, values, message = data.draw(st.sampled_from(BAD_STREAMING))
        arguments = {"mode": "streaming", "loss": self.htl.loss, "labels": LABELS, name: data.draw(st.sampled_from(values))}
        self.attempt(
            "TreeRefresh", lambda: TreeRefresh(self.htl.tree, None, **arguments), ((ValueError, TypeError), message)
        )

    @rule(what=st.sampled_from(["data_and_label_getter", "collate_fn"]))
    def bad_functions(self, what):
        hook = TreeRefresh(self.htl.tree, DATASET)
        refusal = (TypeError, f"{what} must be a function")
        self.attempt("refresh", lambda: hook.refresh(self.model, **{what: 3}), refusal)

    @invariant()
    def the_tree_is_whole(self):
        if not hasattr(self, "htl") or not self.htl.tree.is_fitted:
            return
        tree, loaded = self.htl.tree, ClassTree()
        loaded.load_state_dict(tree.state_dict())  # which checks that the parts belong together
        assert tree.all_labels.tolist() == LABELS.unique().tolist() and len(tree.all_labels) == NUM_CLASSES
        assert tree.waiting is None or self.streaming
        assert loaded.d_0 == tree.d_0 and loaded._num_divided_levels == tree._num_divided_levels
        a, b = tree.labels.unsqueeze(1), tree.labels
        assert torch.equal(loaded.merge_levels(a, b), tree.merge_levels(a, b))
        assert torch.equal(loaded.cophenetic_distances(a, b), tree.cophenetic_distances(a, b))
        found, expected = loaded.state_dict(), tree.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
