"""`ClassTree`: the tree in use is wholly the last one that was fitted or loaded, and every look-up is answered from it."""

import copy
import pickle

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from pml_htl import ClassStatistics, ClassTree
from pml_htl.tree import state as states

from .. import oracle
from .inputs import BAD_EMBEDDINGS, BAD_LABELS, NOT_FINITE, UNKNOWN, draw_batch
from .machine import Hostile, same

CLASSES = [-5, 3, 8, 11]
LEVELS = 5
SEEDS = st.integers(0, 2**16)
FOUND_NAMES = (*states.FOUND_NAMES, "nearest_distances")
LOOK_UPS = ("merge_levels", "merge_thresholds", "cophenetic_distances", "class_spreads", "neighbors", "margin_terms")
NOT_FITTED = (ValueError, "not fitted yet: call fit")
# What a saved state may have become, entry by entry.
SPOILT = {
    "missing": lambda value: None,
    "a list": lambda value: value.tolist(),
    "floats": lambda value: value.float(),
    "complex": lambda value: value + 0j,
    "negative": lambda value: -value - 1,
    "NaN": lambda value: value * torch.nan,
    "sparse": lambda value: value.to_sparse(),
    "without values": lambda value: value.to("meta"),
    "another shape": lambda value: value.unsqueeze(0),
    "cut": lambda value: value[:-1] if value.ndim else value.reshape(1)[:0],
}
AS_GOOD = (("format_version", "floats"), ("format_version", "complex"), ("nearest_distances", "floats"))  # are no change
BAD_ARGUMENTS = {
    "num_levels": [0, -1, True, 2.5, "16", None],
    "max_neighbors": [0, -1, True, 2.5, "16", None],
    "linkage": ["ward", None, 3, ["single"]],
}


def samples(seed, classes=CLASSES):
    """Two to four of each class, (N, 3) and (N,)."""
    batches = [draw_batch([c], 3, seed + place, size=2 + (seed + place) % 3) for place, c in enumerate(classes)]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def bad_statistics(seed):
    embeddings, labels = samples(seed)
    not_finite = ClassStatistics(CLASSES, 3).update(embeddings, labels)
    not_finite._sums[0] = torch.nan
    return {
        "no samples": (ClassStatistics(CLASSES, 3), (ValueError, "no samples of labels -5, 3, 8, 11")),
        "a class has vanished": (
            ClassStatistics(CLASSES, 3).update(embeddings[labels != 8], labels[labels != 8]),
            (ValueError, "no samples of label 8"),
        ),
        "one class": (ClassStatistics([3], 3).update(embeddings[:2], [3, 3]), (ValueError, "at least two classes.*label 3")),
        "single samples": (ClassStatistics([1, 2], 3).update(embeddings[:2], [1, 2]), (ValueError, "single sample")),
        "not finite": (not_finite, (ValueError, "NaN or infinite")),
        "a tensor": (embeddings, (TypeError, "fit takes ClassStatistics, but got Tensor")),
        "nothing": (None, (TypeError, "fit takes ClassStatistics, but got NoneType")),
    }


class TreeMachine(Hostile):
    def __init__(self):
        super().__init__()
        self.tree = ClassTree(LEVELS, max_neighbors=2)
        self.expected = None  # the samples of the tree in use

    def snapshot(self):
        kept = {name: value for name, value in self.tree.__dict__.items() if name not in ("_buffers", "_copies")}
        buffers = {name: getattr(self.tree, name) for name in states.NAMES}
        return {"buffers": {n: v if v is None else v.clone() for n, v in buffers.items()}, **copy.deepcopy(kept)}

    def refusal(self, known):
        return known if self.tree.is_fitted else NOT_FITTED

    @rule(seed=SEEDS)
    def fit(self, seed):
        embeddings, labels = samples(seed)
        self.attempt("fit", lambda: self.tree.fit(ClassStatistics(labels, 3).update(embeddings, labels)))
        self.expected = embeddings, labels

    @rule(seed=SEEDS, data=st.data())
    def fit_bad_statistics(self, seed, data):
        statistics, refusal = data.draw(st.sampled_from(list(bad_statistics(seed).values())))
        self.attempt("fit", lambda: self.tree.fit(statistics), refusal)

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(BAD_EMBEDDINGS)))
    def fit_bad_embeddings(self, seed, kind):
        embeddings, labels = samples(seed)
        spoil, refusal = BAD_EMBEDDINGS[kind]
        self.attempt("fit_embeddings", lambda: self.tree.fit_embeddings(spoil(embeddings), labels), refusal)

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(k for k in BAD_LABELS if "another data set" not in k)))
    def fit_bad_labels(self, seed, kind):
        embeddings, labels = samples(seed)
        spoil, refusal = BAD_LABELS[kind]
        self.attempt("fit_embeddings", lambda: self.tree.fit_embeddings(embeddings, spoil(labels)), refusal)

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(NOT_FINITE)))
    def fit_values_that_are_not_finite(self, seed, kind):
        embeddings, labels = samples(seed)
        embeddings[-1] = NOT_FINITE[kind]
        refusal = (ValueError, "1 of .* embeddings are NaN or infinite .label 11.")
        self.attempt("fit_embeddings", lambda: self.tree.fit_embeddings(embeddings, labels), refusal)

    @rule(seed=SEEDS, line=st.integers(1, 220))
    def fit_with_ctrl_c(self, seed, line):
        embeddings, labels = samples(seed)
        statistics = ClassStatistics(labels, 3).update(embeddings, labels)
        before = self.snapshot()
        self.interrupted("fit", lambda: self.tree.fit(statistics), line)
        if not same(before, self.snapshot()):  # then it must be all of the new one
            self.expected = embeddings, labels

    @rule(line=st.integers(1, 40))
    def look_up_with_ctrl_c(self, line):
        if self.tree.is_fitted:
            self.interrupted("margin_terms", lambda: self.tree.margin_terms(self.tree.labels, CLASSES), line)

    @rule(name=st.sampled_from(LOOK_UPS), kind=st.sampled_from(sorted(BAD_LABELS)), second=st.booleans())
    def look_up_bad_labels(self, name, kind, second):
        good = torch.tensor(CLASSES)
        spoil, (error, message) = BAD_LABELS[kind]
        if "one label per embedding" in message:  # shapes that are no batch, but may be looked up
            return
        bad = spoil(good)
        arguments = {"class_spreads": (bad,), "neighbors": (bad, 1)}.get(name, (good, bad) if second else (bad, good))
        self.attempt(name, lambda: getattr(self.tree, name)(*arguments), self.refusal((error, message)))

    @rule(name=st.sampled_from(["merge_levels", "merge_thresholds", "cophenetic_distances"]))
    def look_up_shapes_that_do_not_broadcast(self, name):
        refusal = self.refusal((ValueError, r"shapes \(4,\) and \(3,\) do not broadcast"))
        self.attempt(name, lambda: getattr(self.tree, name)(CLASSES, CLASSES[:3]), refusal)

    @rule(a=st.sampled_from([(), (1, 1), (4, 1)]))
    def margin_terms_of_other_shapes(self, a):
        refusal = self.refusal((ValueError, r"shapes \(A,\) and \(B,\), but are"))
        self.attempt("margin_terms", lambda: self.tree.margin_terms(torch.full(a, 3), CLASSES), refusal)

    @rule(k=st.sampled_from([0, -1, 3, 10**9, True, 1.5, "1", None]))
    def neighbors_of_a_bad_number(self, k):
        refusal = self.refusal(((ValueError, TypeError), "k must be an integer|k is .* keeps 2 neighbors"))
        self.attempt("neighbors", lambda: self.tree.neighbors(CLASSES, k), refusal)

    @rule(data=st.data(), name=st.sampled_from(sorted(BAD_ARGUMENTS)))
    def bad_arguments(self, data, name):
        value = data.draw(st.sampled_from(BAD_ARGUMENTS[name]))
        self.attempt("ClassTree", lambda: ClassTree(**{name: value}), ((ValueError, TypeError), f"{name} must be"))

    @rule(seed=SEEDS)
    def load(self, seed):
        state = ClassTree(LEVELS, max_neighbors=2).fit_embeddings(*samples(seed)).state_dict()
        self.attempt("load_state_dict", lambda: self.tree.load_state_dict(state))
        self.expected = samples(seed)

    @rule(seed=SEEDS, entry=st.sampled_from([*FOUND_NAMES, "format_version"]), kind=st.sampled_from(sorted(SPOILT)))
    def load_a_spoilt_state(self, seed, entry, kind):
        state = ClassTree(LEVELS, max_neighbors=2).fit_embeddings(*samples(seed)).state_dict()
        if (entry, kind) in AS_GOOD:
            return
        state[entry] = SPOILT[kind](state[entry])
        refusal = (RuntimeError, "class tree itself: .*the tree is left as it was")
        self.attempt("load_state_dict", lambda: self.tree.load_state_dict(state), refusal)

    @rule(seed=SEEDS, line=st.integers(1, 120))
    def load_with_ctrl_c(self, seed, line):
        state = ClassTree(LEVELS, max_neighbors=2).fit_embeddings(*samples(seed)).state_dict()
        before = self.snapshot()
        self.interrupted("load_state_dict", lambda: self.tree.load_state_dict(state), line)
        if not same(before, self.snapshot()):
            self.expected = samples(seed)

    @rule(seed=SEEDS)
    def load_a_tree_of_other_classes(self, seed):
        state = ClassTree(LEVELS).fit_embeddings(*samples(seed, [3, UNKNOWN])).state_dict()
        if self.tree.is_fitted:
            refusal = (RuntimeError, f"2 classes are not the 4 classes of this tree: only one of them has.*{UNKNOWN}")
            self.attempt("load_state_dict", lambda: self.tree.load_state_dict(state), refusal)

    @rule(seed=SEEDS, entry=st.sampled_from(FOUND_NAMES))
    def load_a_part(self, seed, entry):
        state = ClassTree(LEVELS).fit_embeddings(*samples(seed)).state_dict()
        del state[entry]
        self.attempt("load_state_dict", lambda: self.tree.load_state_dict(state), (RuntimeError, f'Missing key.*"{entry}"'))

    @rule(kind=st.sampled_from(["deepcopy", "pickle", "half", "double", "bfloat16"]))
    def copy_or_cast(self, kind):
        change = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda tree: pickle.loads(pickle.dumps(tree)),
            "half": lambda tree: tree.half(),
            "double": lambda tree: tree.double(),
            "bfloat16": lambda tree: tree.to(torch.bfloat16),
        }[kind]
        before = self.snapshot()
        self.tree = self.attempt(kind, lambda: change(self.tree))
        assert same(before["buffers"], self.snapshot()["buffers"])

    @rule(line=st.integers(1, 12))
    def cast_with_ctrl_c(self, line):
        self.interrupted("half", self.tree.half, line)

    @invariant()
    def it_is_the_tree_of_its_samples(self):
        tree = self.tree
        if self.expected is None:
            assert not tree.is_fitted and tree.d_0 == tree.nodes_at_level_0 == tree._num_divided_levels == 0
            return
        embeddings, labels = self.expected
        units, labels = oracle.unit(embeddings.numpy()), labels.numpy()
        distances, (spreads, average) = oracle.class_distances(units, labels), oracle.spreads(units, labels)
        thresholds = oracle.thresholds(average, LEVELS)
        nodes = oracle.single_linkage_nodes(distances, thresholds)
        assert tree.labels.tolist() == sorted(CLASSES)
        np.testing.assert_allclose(tree.spreads, spreads, rtol=0, atol=1e-9)
        np.testing.assert_allclose(tree.thresholds, thresholds, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(tree.nodes, nodes)
        # What is derived from the state belongs to the same one.
        assert tree.d_0 == tree.average_spread.item()
        counts = [len(set(column)) for column in nodes.T]
        assert [getattr(tree, f"nodes_at_level_{level}") for level in range(LEVELS + 1)] == counts
        a, b = tree.labels.unsqueeze(1), tree.labels
        levels = [[int((nodes[i] != nodes[j]).sum()) for j in range(4)] for i in range(4)]
        assert tree.merge_levels(a, b).tolist() == levels
        np.testing.assert_allclose(tree.cophenetic_distances(a, b), oracle.merge_heights(distances), rtol=0, atol=1e-9)
        np.fill_diagonal(distances, np.inf)
        np.testing.assert_array_equal(tree.neighbors(b, 2), b.numpy()[np.argsort(distances, axis=1)[:, :2]])
