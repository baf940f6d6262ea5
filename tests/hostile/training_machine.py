"""Sampler, miner and loss that share a tree: what they give is that of slow loops, or an error, and the tree stays."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance

from pml_htl import HTL, AnchorNeighborSampler, ClassTree, DynamicMarginMiner, HierarchicalTripletLoss
from pml_htl.tree.state import NAMES

from .. import oracle
from .inputs import BAD_EMBEDDINGS, BAD_LABELS, NOT_FINITE, UNKNOWN, draw_batch
from .machine import Hostile

CLASSES = [-5, 3, 8, 11]
SEEDS = st.integers(0, 2**16)
FLOATS = [torch.float16, torch.float32, torch.float64]
MISFITS = ["no labels", "no ref_labels", "another size", "another type", "swap"]
FORMS = {"max": {}, "smooth": {"smooth_loss": True}, "swap": {"swap": True}, "temperature": {"temperature": 0.1}}
KINDS = st.sampled_from(["miner", *FORMS])
OTHER_DATA_SET = [kind for kind in BAD_LABELS if "another data set" in kind]
FEW, ONE = torch.tensor([0, 1]), torch.tensor([0])
BAD_INDICES = {
    "two parts": ((FEW, FEW), (ValueError, "indices_tuple must be .*got 2 parts")),
    "five parts": ((FEW,) * 5, (ValueError, "indices_tuple must be .*got 5 parts")),
    "no parts": ((), (ValueError, "indices_tuple must be .*got 0 parts")),
    "a tensor": (torch.zeros(3, 2), (ValueError, "indices_tuple must be .*got Tensor")),
    "a number": (3, (ValueError, "indices_tuple must be .*got int")),
    "lists": (([0], [1], [2]), (TypeError, "anchors of indices_tuple must be a tensor of integers, but got list")),
    "floats": ((FEW, FEW, FEW.float()), (TypeError, "negatives of indices_tuple .*torch.float32")),
    "booleans": ((FEW, FEW.bool(), FEW, FEW), (TypeError, "positives of indices_tuple .*torch.bool")),
    "missing": ((FEW, FEW, None), (TypeError, "negatives of indices_tuple .*NoneType")),
    "2-D": ((FEW, FEW, FEW.unsqueeze(0)), (ValueError, r"negatives of indices_tuple .*\(T,\), but are \(1, 2\)")),
    "0-D": ((FEW[0], FEW, FEW), (ValueError, r"anchors of indices_tuple .*\(T,\), but are \(\)")),
    "past the end": ((FEW, FEW + 99, FEW), (ValueError, r"positives of indices_tuple must be within 0 .. 5, .*100")),
    "pairs past the end": (
        (FEW, FEW, FEW, FEW + 5),
        (ValueError, r"negatives of indices_tuple must be within 0 .. 5, .*6"),
    ),
    "negative": ((FEW - 1, FEW, FEW), (ValueError, r"anchors of indices_tuple must be within 0 .. 5, .*-1")),
    "lengths": ((FEW, ONE, FEW), (ValueError, "equally long, but they are 2, 1, 2")),
    "lengths of pairs": ((FEW, FEW, ONE, FEW), (ValueError, "equally long, but they are 2, 2, 1, 2")),
}
MINER, LOSS, HTL_SHAPE = {"tree": ClassTree()}, {"miner": DynamicMarginMiner(ClassTree())}, {
    "labels": CLASSES * 3, "num_anchors": 1, "neighborhood_size": 2, "samples_per_class": 2
}  # fmt: skip
NO_COUNTS, NO_NUMBERS = [0, -1, True, 1.5, "2", None], ["a", True, np.nan, np.inf, None, [1]]
BAD_ARGUMENTS = [
    (HTL, HTL_SHAPE, "labels", [[0.5, 1.5], ["a"], None, 3, [[1], [2]], [], [1, 1]], "label|single class"),
    *((HTL, HTL_SHAPE, name, NO_COUNTS, name) for name in ("num_anchors", "neighborhood_size", "samples_per_class")),
    (HTL, HTL_SHAPE, "samples_per_class", [1], "no sample of a batch has a positive"),
    (HTL, HTL_SHAPE, "neighborhood_size", [1], "no sample of a batch has a negative"),
    (HTL, HTL_SHAPE, "neighborhood_size", [5, 10**9], "distinct classes, but the data set has 4"),
    (HTL, HTL_SHAPE, "seed", [-1, 0.5, "a", True], "seed"),
    (AnchorNeighborSampler, {**HTL_SHAPE, "tree": None}, "tree", [None, 3, "tree"], "tree must be a ClassTree"),
    (DynamicMarginMiner, {}, "tree", [None, 3, "tree"], "tree must be a ClassTree"),
    *((DynamicMarginMiner, MINER, name, NO_NUMBERS, name) for name in ("beta", "initial_margin")),
    (DynamicMarginMiner, MINER, "type_of_triplets", ["any", None, 3, ["all"]], "type_of_triplets must be one of"),
    (DynamicMarginMiner, MINER, "distance", [CosineSimilarity(), LpDistance(p=1), 3, LpDistance], "distance must be"),
    (HierarchicalTripletLoss, {}, "miner", [None, 3, ClassTree()], "miner must be a DynamicMarginMiner"),
    (HierarchicalTripletLoss, LOSS, "temperature", [0, -1, True, "a", np.nan, np.inf], "temperature must be"),
    (HierarchicalTripletLoss, LOSS, "triplets_per_anchor", [0, -1, True, "some", 1.5, None], "triplets_per_anchor"),
    (HierarchicalTripletLoss, LOSS, "reducer", [3, "mean"], "reducer must be"),
    (HierarchicalTripletLoss, LOSS, "distance", [3, CosineSimilarity(), LpDistance(power=1)], "distance"),
]


def soft_losses(embeddings, triplets, margin_of, temperature):
    """Of each anchor and positive, by the formula."""
    x = embeddings / embeddings.norm(dim=1, keepdim=True)
    violations = {}
    for a, p, n in triplets:
        violation = ((x[a] - x[p]) ** 2).sum() - ((x[a] - x[n]) ** 2).sum() + margin_of(a, n)
        violations.setdefault((a, p), []).append(violation / temperature)
    return torch.stack([temperature * torch.stack(v).exp().sum().log1p() for v in violations.values()])


class TrainingMachine(Hostile):
    @initialize()
    def begin(self):
        self.tree = ClassTree(5)
        self.miner = DynamicMarginMiner(self.tree)
        self.losses = {name: HierarchicalTripletLoss(self.miner, **options) for name, options in FORMS.items()}
        shape = {"num_anchors": 1, "neighborhood_size": 3, "samples_per_class": 2}
        self.sampler = AnchorNeighborSampler(CLASSES * 3, self.tree, **shape, batches_per_epoch=2, seed=0)

    def snapshot(self):
        buffers = {name: getattr(self.tree, name) for name in NAMES}
        place = self.sampler.state_dict()
        next_epoch = place["epoch"] + (place["generator"] is not None)  # an epoch that begins is no change
        sampler = {"epoch": next_epoch, "walk": [*place["skipped"], *place["walk"].tolist()]}
        return {"tree": {n: v if v is None else v.clone() for n, v in buffers.items()}, "sampler": sampler}

    def part(self, kind):
        return self.miner if kind == "miner" else self.losses[kind]

    def margin(self, a, n):
        return float(self.miner.margins(int(a), int(n)))

    @property
    def has_our_classes(self):
        return not self.tree.is_fitted or self.tree.labels.tolist() == sorted(CLASSES)

    @rule(seed=SEEDS, classes=st.sampled_from([CLASSES, CLASSES, [3, 8, UNKNOWN + 1]]))
    def fit(self, seed, classes):
        batches = [draw_batch([c], 3, seed + c % 99, size=3) for c in classes]
        embeddings, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        self.attempt("fit_embeddings", lambda: self.tree.fit_embeddings(embeddings, labels))

    @rule(
        seed=SEEDS, kind=st.sampled_from(sorted(FORMS)), dtype=st.sampled_from([torch.float16, torch.float32, torch.float64])
    )
    def loss(self, seed, kind, dtype):
        """The form's loss and gradient are those of the loops, in half precision up to its rounding of the embeddings."""
        embeddings, labels = draw_batch(CLASSES, 3, seed, dtype=dtype)
        if not self.has_our_classes:
            if not set(labels.tolist()) <= set(self.tree.labels.tolist()):
                refusal = (ValueError, "labels? (-5|11).* not among the 3 classes")
                self.attempt(kind, lambda: self.losses[kind](embeddings, labels), refusal)
            return
        leaf = embeddings.clone().requires_grad_()
        found = self.attempt(kind, lambda: self.losses[kind](leaf, labels))
        found.backward()
        assert leaf.grad.isfinite().all()
        assert abs(float(found) - self.expected_loss(kind, embeddings, labels)) < 1e-4

    def expected_loss(self, kind, embeddings, labels):
        """The mean of the losses above zero, by loops; those that are NaN are none, as in PML's reducer."""
        triplets, exact = oracle.triplets(labels), embeddings.double()
        if not triplets:
            return 0.0
        if kind == "temperature":
            every = soft_losses(exact, triplets, lambda a, n: self.margin(labels[a], labels[n]), FORMS[kind]["temperature"])
        else:
            options = {"smooth": kind == "smooth", "swap": kind == "swap"}
            every = oracle.losses(exact, triplets, lambda a, n: self.margin(labels[a], labels[n]), **options)
        return float(every[every > 0].mean()) if (every > 0).any() else 0.0

    @rule(seed=SEEDS, kind=KINDS, bad=st.sampled_from(sorted(BAD_LABELS)), as_reference=st.booleans())
    def bad_labels(self, seed, kind, bad, as_reference):
        embeddings, labels = draw_batch(CLASSES, 3, seed)
        spoil, refusal = BAD_LABELS[bad]
        if not self.has_our_classes or (kind == "swap" and as_reference):
            return
        if bad in OTHER_DATA_SET and not self.tree.is_fitted:  # nobody can know
            refusal = None
        part, spoilt = self.part(kind), spoil(labels)
        if as_reference:
            self.attempt(kind, lambda: part(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=spoilt), refusal)
        else:
            self.attempt(kind, lambda: part(embeddings, spoilt), refusal)

    @rule(seed=SEEDS, kind=KINDS, bad=st.sampled_from(sorted(BAD_EMBEDDINGS)), as_reference=st.booleans())
    def bad_embeddings(self, seed, kind, bad, as_reference):
        embeddings, labels = draw_batch(CLASSES, 3, seed)
        spoil, refusal = BAD_EMBEDDINGS[bad]
        part, spoilt = self.part(kind), spoil(embeddings)
        if not self.has_our_classes or (as_reference and (kind == "swap" or bad == "missing")):
            return
        if as_reference:
            refusal = refusal[0], refusal[1].replace(r"\(B, .*", r"\(B, 3\), ")
            self.attempt(kind, lambda: part(embeddings, labels, ref_emb=spoilt, ref_labels=labels.clone()), refusal)
        else:
            self.attempt(kind, lambda: part(spoilt, labels), refusal)

    @rule(seed=SEEDS, kind=KINDS, what=st.sampled_from(MISFITS))
    def what_does_not_go_together(self, seed, kind, what):
        embeddings, labels = draw_batch(CLASSES, 3, seed)
        ref, ref_labels = embeddings.clone(), labels.clone()
        part = self.part(kind)
        calls = {
            "no labels": (lambda: part(embeddings, None), (ValueError, "^labels are required")),
            "no ref_labels": (lambda: part(embeddings, labels, ref_emb=ref), (ValueError, "^ref_labels are required")),
            "another size": (
                lambda: part(embeddings, labels, ref_emb=ref[:, :2], ref_labels=ref_labels),
                (ValueError, r"ref_emb must be of shape \(B, 3\), but they are \(6, 2\)"),
            ),
            "another type": (
                lambda: part(embeddings, labels, ref_emb=ref.float(), ref_labels=ref_labels),
                (TypeError, "embeddings are torch.float64, but ref_emb is torch.float32"),
            ),
            "swap": (
                lambda: self.losses["swap"](embeddings, labels, ref_emb=ref, ref_labels=ref_labels),
                (ValueError, "swap=True does not work with ref_emb"),
            ),
        }
        self.attempt(kind, *calls[what])

    @rule(seed=SEEDS, kind=st.sampled_from(sorted(FORMS)), bad=st.sampled_from(sorted(BAD_INDICES)))
    def bad_indices(self, seed, kind, bad):
        embeddings, labels = draw_batch(CLASSES, 3, seed)
        given_indices, refusal = BAD_INDICES[bad]
        self.attempt(kind, lambda: self.losses[kind](embeddings, labels, given_indices), refusal)

    @rule(seed=SEEDS, kind=KINDS, bad=st.sampled_from(sorted(NOT_FINITE)))
    def values_that_are_not_finite(self, seed, kind, bad):
        """No error, since mixed precision meets such batches now and then: NaN, or what PML makes of the others."""
        embeddings, labels = draw_batch(CLASSES, 3, seed)
        embeddings[0] = NOT_FINITE[bad]
        if self.has_our_classes:
            found = self.attempt(kind, lambda: self.part(kind)(embeddings, labels))
            if kind == "max":
                assert found.isnan() or not oracle.triplets(labels) or labels[0] not in labels[1:]
            elif kind != "miner":
                assert found.isnan() or abs(float(found) - self.expected_loss(kind, embeddings, labels)) < 1e-4

    @rule(kind=KINDS, size=st.sampled_from([0, 1, 5]), classes=st.sampled_from([[3], CLASSES]))
    def batches_without_triplets(self, kind, size, classes):
        embeddings, labels = draw_batch(classes[:1], 3, 0, size=size)
        embeddings.requires_grad_()
        if self.has_our_classes:
            found = self.attempt(kind, lambda: self.part(kind)(embeddings, labels))
            if kind == "miner":
                assert [len(index) for index in found] == [0, 0, 0]
            else:
                found.backward()
                assert found == 0 and (embeddings.grad == 0).all()

    @rule()
    def draw(self):
        if not self.has_our_classes:
            refusal = (ValueError, f"the tree has 3 classes and the sampler has 4.*{UNKNOWN + 1}")
            self.attempt("sampler", lambda: next(iter(self.sampler)), refusal)
            return
        for batch in self.attempt("sampler", lambda: list(self.sampler)):
            classes = self.sampler.labels[batch].reshape(3, 2)
            assert (classes == classes[:, :1]).all() and len(set(classes[:, 0].tolist())) == 3
            if self.tree.is_fitted:
                assert classes[1:, 0].tolist() == self.tree.neighbors(int(classes[0, 0]), 2).tolist()

    @rule(epoch=st.sampled_from([-1, True, 1.5, "1", None]))
    def bad_epoch(self, epoch):
        self.attempt("set_epoch", lambda: self.sampler.set_epoch(epoch), ((ValueError, TypeError), "epoch must be"))

    @rule(data=st.data(), row=st.sampled_from(BAD_ARGUMENTS))
    def bad_arguments(self, data, row):
        make, others, name, values, message = row
        value = data.draw(st.sampled_from(values))
        self.attempt(make.__name__, lambda: make(**{**others, name: value}), ((ValueError, TypeError), message))

    @invariant()
    def margins_are_those_of_the_tree(self):
        if not hasattr(self, "tree") or not self.tree.is_fitted:
            return
        labels, levels, spreads = (getattr(self.tree, name).numpy() for name in ("labels", "thresholds", "spreads"))
        expected = [
            [oracle.margin(self.tree.nodes.numpy(), levels, spreads, a, n) for n in range(len(labels))]
            for a in range(len(labels))
        ]
        found = self.miner.margins(self.tree.labels.unsqueeze(1), self.tree.labels)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
