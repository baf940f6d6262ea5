"""Hierarchical Triplet Loss (Ge et al., ECCV 2018) for pytorch-metric-learning."""

from .hooks import TreeRefresh
from .losses import HierarchicalTripletLoss
from .miners import DynamicMarginMiner
from .recipe import HTL
from .samplers import AnchorNeighborSampler
from .tree import ClassStatistics, ClassTree

__version__ = "0.1.0"

__all__ = [
    "HTL",
    "AnchorNeighborSampler",
    "ClassStatistics",
    "ClassTree",
    "DynamicMarginMiner",
    "HierarchicalTripletLoss",
    "TreeRefresh",
    "__version__",
]
