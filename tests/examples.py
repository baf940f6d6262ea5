"""Hypothesis strategies for embeddings with labels: random, clustered, tied and degenerate, of uneven classes."""

import numpy as np
from hypothesis import strategies as st

from . import oracle

KINDS = ("random", "clustered", "tied", "degenerate")


def make_embeddings(kind, sizes, dimensions, seed):
    """Unit vectors (N, D) float64 and labels (N,) in random order; labels are neither small nor contiguous."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.choice(10**6, len(sizes), replace=False) - 5 * 10**5, sizes)
    samples = rng.normal(size=(len(labels), dimensions))
    if kind == "clustered":  # classes in three groups
        groups = rng.normal(size=(3, dimensions))[rng.integers(3, size=len(sizes))]
        centres = groups + 0.3 * rng.normal(size=(len(sizes), dimensions))
        samples = np.repeat(centres, sizes, axis=0) + 0.1 * samples
    elif kind == "tied":  # corners of a cube: many equal distances
        samples = rng.choice([-1.0, 1.0], size=samples.shape)
    elif kind == "degenerate":  # all samples of a class are one point, and some classes share it
        points = rng.normal(size=(max(2, len(sizes) // 2), dimensions))
        samples = np.repeat(points[rng.integers(len(points), size=len(sizes))], sizes, axis=0)
    order = rng.permutation(len(labels))
    return oracle.unit(samples)[order], labels[order]


def are_apart(embeddings):
    """Whether no two samples nearly coincide: the gradient of a plain distance d is wrong by eps / d^2, here 2e-11."""
    units = oracle.unit(np.asarray(embeddings))
    return np.linalg.norm(units[:, np.newaxis] - units, axis=2)[np.triu_indices(len(units), 1)].min() > 3e-3


@st.composite
def labelled_embeddings(draw, kinds=KINDS, max_classes=9):
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=max_classes).filter(lambda sizes: max(sizes) > 1))
    kind, dimensions = draw(st.sampled_from(kinds)), draw(st.integers(2, 6))
    return make_embeddings(kind, sizes, dimensions, draw(st.integers(0, 2**32 - 1)))
