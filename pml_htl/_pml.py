"""Everything that the package imports of pytorch-metric-learning, in one place; a port to another version begins here.

What it uses without importing: attributes of a trainer, in `hooks.py`. PML is never patched.
"""

from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer
from pytorch_metric_learning.utils.common_functions import process_label, to_device
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_triplets, get_matches_and_diffs

__all__ = [
    "AvgNonZeroReducer",
    "BaseMetricLossFunction",
    "BaseMiner",
    "LpDistance",
    "convert_to_triplets",
    "get_matches_and_diffs",
    "process_label",
    "to_device",
]
