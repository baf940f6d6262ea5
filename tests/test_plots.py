import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.cluster.hierarchy as hierarchy
import torch
from matplotlib.offsetbox import AnnotationBbox

from pml_htl import ClassTree
from pml_htl.plots import plot_tree

from .examples import make_embeddings


@pytest.fixture
def tree():
    embeddings, labels = make_embeddings("clustered", [3] * 30, 5, seed=0)
    yield ClassTree().fit_embeddings(torch.from_numpy(embeddings), labels)
    plt.close("all")


def test_classes_meet_at_the_heights_of_the_tree(tree):
    chosen = tree.labels[[3, 7, 8, 20]]
    ax = plot_tree(tree, chosen, name=lambda label: f"class {label}")
    texts = {text.get_text() for text in ax.texts}
    assert {f"class {label}" for label in chosen.tolist()} <= texts
    drawn = {round(float(y), 6) for line in ax.collections for path in line.get_paths() for y in path.vertices[:, 1]}
    square = np.zeros((30, 30))
    square[np.triu_indices(30, 1)] = hierarchy.cophenet(tree.to_scipy_linkage())
    meetings = {round(height, 6) for height in square[np.ix_([3, 7, 8, 20], [3, 7, 8, 20])].ravel() if height}
    assert drawn - {0.0} == meetings


def test_pictures_as_leaves_and_thresholds(tree):
    ax = plot_tree(tree, image=lambda label: np.zeros((8, 8)))
    assert sum(isinstance(artist, AnnotationBbox) for artist in ax.artists) == 30
    low, high = ax.get_ylim()
    inside = [level for level, threshold in enumerate(tree.thresholds.tolist()) if low <= threshold <= high]
    assert {f" $d_{{{level}}}$" for level in inside} == {text.get_text() for text in ax.texts}
    assert inside


def test_refusals(tree):
    with pytest.raises(ValueError, match="not fitted"):
        plot_tree(ClassTree())
    with pytest.raises(ValueError, match="2 to 80 classes, not 1"):
        plot_tree(tree, tree.labels[:1])
    with pytest.raises(ValueError, match="10000000 not among the 30 classes"):
        plot_tree(tree, [10**7])
