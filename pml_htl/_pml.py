"""Everything that we use of pytorch-metric-learning beyond its documented API, in one place.

A port to another version of PML begins here. We never patch PML; we only import.
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
