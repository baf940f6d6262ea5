"""How embeddings are judged: by PML's tester, with MAP@R and the recalls that are usual for the data set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.logging_presets import HookContainer

from ..data import Splits

BATCH_SIZE = 512
METRICS = {  # PML's names and those of the results file
    "mean_average_precision_at_r": "map_at_r",
    "precision_at_1": "precision_at_1",
    "r_precision": "r_precision",
}
PRIMARY_METRIC = "mean_average_precision_at_r"


class RecallCalculator(AccuracyCalculator):
    """PML's calculator with `recall_at_K` for some K: the share of queries with one of their class among the K nearest.

    It looks at as many neighbours as MAP@R takes (the largest class) and the recalls, and no more than there are.
    """

    def __init__(self, recall_at: tuple[int, ...], **kwargs: Any) -> None:
        self.recall_at = recall_at
        for k in recall_at:  # PML finds metrics by this name
            setattr(self, f"calculate_recall_at_{k}", partial(recall, k=k))
        super().__init__(label_comparison_fn=same_label, exclude=("AMI", "NMI"), **kwargs)  # PML refuses both together

    def requires_knn(self) -> list[str]:
        """The metrics that are made of nearest neighbours."""
        return [*super().requires_knn(), *(f"recall_at_{k}" for k in self.recall_at)]

    def determine_k(self, bin_counts: torch.Tensor, num_reference_embeddings: int, ref_includes_query: bool) -> int:
        """For each split its own: a small one must not cut the accuracies of another short."""
        return min(max(int(bin_counts.max()), *self.recall_at, 1), num_reference_embeddings - int(ref_includes_query))


def same_label(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Whether labels are equal, elementwise.

    With a function of ours PML counts the samples of one class at a time. With its own it compares all classes with all
    samples at once, at nine bytes each: 7 GiB for 5,600 classes of 27.
    """
    return first == second


def recall(
    *, knn_labels: torch.Tensor, query_labels: torch.Tensor, not_lone_query_mask: torch.Tensor, k: int, **_: Any
) -> float:
    """The share of queries (those with a match at all) of whose k nearest some have their label; NaN without any.

    Args:
        knn_labels: (Q, K) of the nearest, nearest first, the query itself left out; with K < k all of them.
        query_labels: (Q,) or (Q, 1). not_lone_query_mask: (Q,) bool.
    """
    hits = (knn_labels.flatten(1)[:, :k] == query_labels.view(-1, 1)).any(dim=1)
    return hits[not_lone_query_mask].cpu().double().mean().item()  # on the host, as not every device has float64


def make_tester(hooks: HookContainer, data: Splits, workers: int, device: torch.device) -> GlobalEmbeddingSpaceTester:
    """A tester that reports to PML's hook container."""
    names = (*METRICS, *(f"recall_at_{k}" for k in data.recall_at))
    return GlobalEmbeddingSpaceTester(
        batch_size=BATCH_SIZE,
        dataloader_num_workers=workers,
        data_device=device,
        end_of_testing_hook=hooks.end_of_testing_hook,
        accuracy_calculator=RecallCalculator(data.recall_at, include=names, device=device),
    )


def save_embeddings(tester: Any, folder: Path) -> None:
    """An end-of-testing hook: keeps the embeddings of each split that was tested in SPLIT_embeddings.npy, (N, D) float16."""
    for split, (embeddings, _) in tester.embeddings_and_labels.items():
        np.save(folder / f"{split}_embeddings.npy", embeddings.cpu().numpy().astype(np.float16))


def accuracies_of(found: dict[str, float]) -> dict[str, Any]:
    """PML's accuracies, of one split at one epoch, by the names of the results file."""
    recalls = {name: value for name, value in found.items() if name.startswith("recall_at_")}
    accuracies: dict[str, Any] = {ours: float(found[f"{theirs}_level0"]) for theirs, ours in METRICS.items()}
    if recalls:
        by_k = sorted((int(name.split("_")[2]), float(value)) for name, value in recalls.items())
        accuracies["recall"] = {str(k): value for k, value in by_k}
    return accuracies


def test_splits(data: Splits) -> tuple[dict[str, Any], list[tuple[str, list[str]]]]:
    """The data sets of the test by name, and which is looked up in which."""
    if data.gallery is None:
        return {"test": data.test}, [("test", ["test"])]
    return {"test": data.test, "gallery": data.gallery}, [("test", ["gallery"])]
