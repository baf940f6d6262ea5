"""Everything that the package imports of pytorch-metric-learning, in one place; a port to another version begins here.

What it uses without importing: attributes of a trainer, in `hooks.py`. PML is never patched.
"""

from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory, SelfSupervisedLoss
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    BaseReducer,
    ClassWeightedReducer,
    MeanReducer,
    MultipleReducers,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.common_functions import process_label, to_device
from pytorch_metric_learning.utils.loss_and_miner_utils import get_matches_and_diffs, get_random_triplet_indices

__all__ = [
    "AvgNonZeroReducer",
    "BaseMetricLossFunction",
    "BaseMiner",
    "BaseReducer",
    "ClassWeightedReducer",
    "CrossBatchMemory",
    "LpDistance",
    "MPerClassSampler",
    "MeanReducer",
    "MultipleReducers",
    "SelfSupervisedLoss",
    "SumReducer",
    "ThresholdReducer",
    "get_matches_and_diffs",
    "get_random_triplet_indices",
    "process_label",
    "to_device",
]
