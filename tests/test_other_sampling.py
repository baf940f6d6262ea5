"""The other ways to draw batches that the benchmarks compare with ours."""

import numpy as np
import pytest
import torch

from benchmarks.methods.contenders import parse_contender
from benchmarks.methods.method import Task

LABELS = torch.arange(40).repeat_interleave(6)
TASK = Task(LABELS, batch_size=32, embedding_size=16, iterations=10, seed=0)


def sampler_of(sampling, spread=None):
    """With a tree in which classes 0 and 1 are one; `spread` (40,) scales the samples of each class around its mean."""
    parts = parse_contender(f"htl:sampling={sampling},neighborhood_size=2,samples_per_class=4").build(TASK)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 16, generator=generator)
    centres[1] = centres[0]
    spread = torch.full((40,), 0.3) if spread is None else spread
    noise = torch.randn(len(LABELS), 16, generator=generator) * spread[LABELS].unsqueeze(1)
    parts.tree.fit_embeddings(centres[LABELS] + noise, LABELS)
    return parts.sampler, parts.tree


def groups(sampler, batches):
    """The classes of each neighbourhood (batches * anchors, 2) of so many batches."""
    found = []
    while len(found) < batches:
        found += [LABELS[torch.tensor(batch)].view(-1, 2, 4)[:, :, 0] for batch in sampler]
    return torch.cat(found[:batches]).numpy()


@pytest.mark.parametrize("sampling", ["neighbors-apart", "neighbors-distinct"])
def test_neighbours_as_near_as_samples_of_one_class_are_left_out(sampling):
    spread = torch.full((40,), 0.3)
    spread[:2] = 0.2 if sampling == "neighbors-apart" else 0.4  # two halves of a class may be farther apart than d_0
    sampler, tree = sampler_of("neighbors", spread)
    assert tree.merge_levels(0, 1) == (0 if sampling == "neighbors-apart" else 1)
    assert all(other == 1 - own for own, other in groups(sampler, 20) if own in (0, 1))
    sampler, tree = sampler_of(sampling, spread)
    found = groups(sampler, 20)
    assert not any({*pair} == {0, 1} for pair in found.tolist())
    for own, other in found:  # the next nearest, unless the batch has it already
        assert other in tree.neighbors(int(own), 8).tolist()


def test_ratio_prefers_wide_classes():
    """Of classes equally near, a ratio to the spreads is smaller with the wider one."""
    spread = torch.full((40,), 0.05)
    spread[::2] = 0.6
    sampler, tree = sampler_of("neighbors-ratio", spread)
    distances, spreads = tree.nearest_distances.numpy(), tree.spreads.numpy()
    ratios = distances / ((spreads[:, np.newaxis] + spreads[tree.nearest_classes.numpy()]) / 2)
    nearest = tree.nearest_classes.numpy()[np.arange(40), ratios.argmin(axis=1)]
    assert (sampler._neighbors()[:, 0] == nearest).all() and (nearest != tree.nearest_classes[:, 0].numpy()).any()
    assert (nearest % 2 == 0).mean() > 0.8


def test_hard_anchors_come_more_often():
    sampler, tree = sampler_of("neighbors-hard")
    sampler.batches_per_epoch = 200
    anchors = groups(sampler, 200)[:, 0]
    counts = np.bincount(anchors, minlength=40)
    table = tree.confusable(1000)
    nearest = np.array([table["ratio"][(table["label_a"] == c) | (table["label_b"] == c)].min() for c in range(40)])
    easy = np.argsort(nearest)[20:]
    assert counts.sum() == 800 and counts[easy].sum() < 320 and (counts > 0).all()


@pytest.mark.parametrize("sampling", ["neighbors-apart", "neighbors-distinct", "neighbors-ratio", "neighbors-hard"])
def test_before_a_fit_they_draw_as_ours(sampling):
    ours, other = (parse_contender(f"htl:sampling={name}").build(TASK).sampler for name in ("neighbors", sampling))
    assert list(ours) == list(other)
