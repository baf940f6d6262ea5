"""The paths by which users import: as documented, they stay."""

import importlib

import pytest

import pml_htl

PUBLIC = {
    "pml_htl": [
        *("ClassStatistics", "ClassTree", "AnchorNeighborSampler", "DynamicMarginMiner", "HierarchicalTripletLoss"),
        *("TreeRefresh", "HTL", "__version__"),
    ],
    "pml_htl.tree": ["ClassStatistics", "ClassTree"],
    "pml_htl.samplers": ["AnchorNeighborSampler"],
    "pml_htl.miners": ["DynamicMarginMiner"],
    "pml_htl.losses": ["HierarchicalTripletLoss", "CrossBatchMemory", "SelfSupervisedLoss"],
    "pml_htl.hooks": ["TreeRefresh"],
    "pml_htl.recipe": ["HTL"],
    "pml_htl.plots": ["plot_tree"],
    "pml_htl.checkpoint": ["Checkpoint", "CheckpointHook"],
    "pml_htl.lightning": ["TreeRefreshCallback"],
    "pml_htl.distributed": ["Ranks"],
}


@pytest.mark.parametrize("path, name", [(path, name) for path, names in PUBLIC.items() for name in names])
def test_it_is_there(path, name):
    if path == "pml_htl.lightning":
        pytest.importorskip("lightning")
    found = getattr(importlib.import_module(path), name)
    assert name == "__version__" or found.__doc__
    assert getattr(pml_htl, name, found) is found  # one class, whatever the path


def test_the_package_exports_these_and_no_others():
    assert sorted(pml_htl.__all__) == sorted(PUBLIC["pml_htl"])
