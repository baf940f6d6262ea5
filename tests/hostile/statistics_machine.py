"""`ClassStatistics` beside the samples themselves: every one that was ever added, with its weight."""

import itertools

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from pml_htl import ClassStatistics
from pml_htl.tree.statistics import SUMS

from .inputs import BAD_EMBEDDINGS, BAD_LABELS, NOT_FINITE, NOT_INTEGERS, UNKNOWN, draw_batch
from .machine import Hostile, same

FLOATS = [torch.float16, torch.float32, torch.float64]
SEEDS = st.integers(0, 2**16)
BAD_ROWS = {
    "outside": (torch.tensor([99]), (ValueError, "positions must be within 0 .. .*99")),
    "negative": (torch.tensor([-1]), (ValueError, "positions must be within 0 .. .*-1")),
    "floats": (torch.tensor([1.5]), (TypeError, "positions must be integers")),
    "a mask": (torch.tensor([True]), (TypeError, "positions must be integers")),
    "a number": (0, (ValueError, r"positions must be of shape \(R,\)")),
    "a string": ("first", (TypeError, "positions must be integers")),
}
BAD_ARGUMENTS = {
    "embedding_size": ([0, -1, True, 2.5, "3", None], (TypeError, ValueError)),
    "forget": ([0, -0.5, 1.5, np.nan, "1", None, 1j], ValueError),
    "labels": ([[], [0.5], ["a"], None, torch.ones(2)], (TypeError, ValueError)),
}


class StatisticsMachine(Hostile):
    @initialize(dimensions=st.integers(1, 4), forget=st.sampled_from([1.0, 0.5]), num_classes=st.integers(1, 5))
    def begin(self, dimensions, forget, num_classes):
        self.dimensions, self.classes = dimensions, [7 * c - 10 for c in range(num_classes)]
        self.statistics = ClassStatistics(self.classes, dimensions, forget=forget)
        self.samples = {c: [] for c in self.classes}  # of each class, [weight, unit vector]

    def snapshot(self):
        return {name: getattr(self.statistics, name).clone() for name in ("labels", *SUMS)}

    def batch(self, seed):
        return draw_batch(self.classes, self.dimensions, seed)

    def remember(self, embeddings, labels):
        for label in set(labels.tolist()):
            for sample in self.samples[label]:
                sample[0] *= self.statistics.forget
        for x, label in zip(embeddings.double().numpy(), labels.tolist(), strict=True):
            self.samples[label].append([1.0, x / max(np.linalg.norm(x), 1e-12)])

    @rule(seed=SEEDS, dtype=st.sampled_from(FLOATS), scale=st.sampled_from([0, 1, 1e3]))
    def update(self, seed, dtype, scale):
        embeddings, labels = self.batch(seed)
        embeddings = (scale * embeddings).to(dtype)
        self.attempt("update", lambda: self.statistics.update(embeddings, labels))
        self.remember(embeddings, labels)

    @rule()
    def update_with_nothing(self):
        empty = torch.empty(0, self.dimensions)
        self.attempt("update", lambda: self.statistics.update(empty, []))

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(BAD_LABELS)))
    def update_with_bad_labels(self, seed, kind):
        embeddings, labels = self.batch(seed)
        spoil, refusal = BAD_LABELS[kind]
        self.attempt("update", lambda: self.statistics.update(embeddings, spoil(labels)), refusal)

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(BAD_EMBEDDINGS)))
    def update_with_bad_embeddings(self, seed, kind):
        embeddings, labels = self.batch(seed)
        spoil, refusal = BAD_EMBEDDINGS[kind]
        self.attempt("update", lambda: self.statistics.update(spoil(embeddings), labels), refusal)

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(NOT_FINITE)))
    def update_with_values_that_are_not_finite(self, seed, kind):
        embeddings, labels = self.batch(seed)
        embeddings[seed % len(labels)] = NOT_FINITE[kind]
        refusal = (ValueError, f"1 of 6 embeddings are NaN or infinite .label {labels[seed % len(labels)]}")
        self.attempt("update", lambda: self.statistics.update(embeddings, labels), refusal)

    @rule(seed=SEEDS)
    def update_with_another_size(self, seed):
        embeddings, labels = draw_batch(self.classes, self.dimensions + 1, seed)
        refusal = (ValueError, rf"shape \(B, {self.dimensions}\), but they are \(6, {self.dimensions + 1}\)")
        self.attempt("update", lambda: self.statistics.update(embeddings, labels), refusal)

    @rule(seed=SEEDS, line=st.integers(1, 60))
    def update_with_ctrl_c(self, seed, line):
        embeddings, labels = self.batch(seed)
        before = self.snapshot()
        self.interrupted("update", lambda: self.statistics.update(embeddings, labels), line)
        if not same(before, self.snapshot()):  # then it must be all of the batch
            self.remember(embeddings, labels)

    @rule(seed=SEEDS, line=st.integers(1, 30))
    def merge(self, seed, line):
        embeddings, labels = self.batch(seed)
        other = ClassStatistics(self.classes, self.dimensions).update(embeddings, labels)
        before = self.snapshot()
        self.interrupted("merge", lambda: self.statistics.merge(other), line)
        if not same(before, self.snapshot()):
            for x, label in zip(embeddings.numpy(), labels.tolist(), strict=True):
                self.samples[label].append([1.0, x / np.linalg.norm(x)])

    @rule(kind=st.sampled_from(["something else", "another size", "other classes"]))
    def merge_with_bad_ones(self, kind):
        other, refusal = {
            "something else": (torch.ones(3), (TypeError, "only other ClassStatistics.*Tensor")),
            "another size": (ClassStatistics(self.classes, self.dimensions + 1), (ValueError, "embedding sizes differ")),
            "other classes": (ClassStatistics([UNKNOWN], self.dimensions), (ValueError, "classes differ: . here, 1 in")),
        }[kind]
        self.attempt("merge", lambda: self.statistics.merge(other), refusal)

    @rule(label=st.integers(-3, 3), line=st.integers(1, 25), shape=st.sampled_from([(), (1,), (1, 1)]))
    def add_classes(self, label, line, shape):
        before = self.snapshot()
        self.interrupted("add_classes", lambda: self.statistics.add_classes(torch.full(shape, label)), line)
        if not same(before, self.snapshot()):
            self.samples[label] = []
            self.classes = sorted(self.samples)

    @rule(given=st.sampled_from([[0.5], ["a"], None, torch.tensor([True])]))
    def add_bad_classes(self, given):
        self.attempt("add_classes", lambda: self.statistics.add_classes(given), NOT_INTEGERS)

    @rule(kind=st.sampled_from(sorted(BAD_ROWS)))
    def bad_rows(self, kind):
        rows, refusal = BAD_ROWS[kind]
        self.attempt("squared_distances", lambda: self.statistics.squared_distances(rows), refusal)

    @rule(data=st.data(), name=st.sampled_from(sorted(BAD_ARGUMENTS)))
    def bad_arguments(self, data, name):
        values, errors = BAD_ARGUMENTS[name]
        arguments = {"labels": [1, 2], "embedding_size": 3, name: data.draw(st.sampled_from(values))}
        self.attempt(
            "ClassStatistics", lambda: ClassStatistics(**arguments), (errors, name if name != "labels" else "label")
        )

    @invariant()
    def it_is_what_the_samples_say(self):
        if not hasattr(self, "samples"):
            return
        found = self.statistics
        assert found.labels.tolist() == self.classes
        assert found.counts.tolist() == [len(self.samples[c]) for c in self.classes]
        for place, label in enumerate(self.classes):
            if not self.samples[label]:
                assert found.means[place].isnan().all() and found.spreads[place].isnan()
                continue
            weights, points = (np.array(part) for part in zip(*self.samples[label], strict=True))
            np.testing.assert_allclose(found.means[place], weights @ points / weights.sum(), rtol=0, atol=1e-9)
            pairs = list(itertools.permutations(range(len(points)), 2))
            if not pairs:
                continue
            weight_of_pairs = [weights[i] * weights[j] for i, j in pairs]
            squared = [((points[i] - points[j]) ** 2).sum() for i, j in pairs]
            if sum(weight_of_pairs) > 1e-6 * weights.sum() ** 2:  # or one sample has all the weight
                np.testing.assert_allclose(found.spreads[place], np.average(squared, weights=weight_of_pairs), atol=1e-6)
