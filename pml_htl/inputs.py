"""What loss and miner are called with, made ready: full precision, labels checked and on the embeddings' device."""

from __future__ import annotations

from typing import TypeAlias

import torch

from .tree import ClassTree

Inputs: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def prepare_inputs(
    tree: ClassTree,
    embeddings: torch.Tensor,
    labels: torch.Tensor | None,
    ref_emb: torch.Tensor | None,
    ref_labels: torch.Tensor | None,
) -> Inputs:
    """The same four, float16 and bfloat16 raised to float32, labels on the device of their embeddings.

    Labels that are still on the host are looked up in the tree there, so that a wrong one is named, and move without
    anyone waiting for the device. What was one object stays one: PML tells by that whether there is a reference set.

    Raises:
        ValueError: a label on the host that the fitted tree does not know.
    """
    ready_labels = _ready_labels(tree, labels, embeddings.device)
    ready_embeddings = _at_least_float32(embeddings)
    if ref_emb is None:
        return ready_embeddings, ready_labels, None, ref_labels
    return (
        ready_embeddings,
        ready_labels,
        ready_embeddings if ref_emb is embeddings else _at_least_float32(ref_emb),
        ready_labels if ref_labels is labels else _ready_labels(tree, ref_labels, ref_emb.device),
    )


def _ready_labels(tree: ClassTree, labels: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    if labels is None or labels.device == device:
        return labels
    if labels.device.type == "cpu":
        tree.check_labels(labels)
        if device.type == "cuda":
            return labels.pin_memory().to(device, non_blocking=True)
    return labels.to(device)


def _at_least_float32(embeddings: torch.Tensor) -> torch.Tensor:
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
