"""What loss and miner are called with, checked and made ready: full precision, labels on the embeddings' device."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from .arithmetic.triplets import Mined
from .common.batches import check_embeddings, check_lengths
from .common.labels import Labels, label_tensor
from .tree import ClassTree

Inputs: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
NAMES_OF_INDICES = {3: ("anchors", "positives", "negatives"), 4: ("anchors", "positives", "anchors", "negatives")}


def prepare_inputs(
    tree: ClassTree | None,
    embeddings: torch.Tensor,
    labels: Labels | None,
    ref_emb: torch.Tensor | None,
    ref_labels: Labels | None,
) -> Inputs:
    """The same four, float16 and bfloat16 raised to float32, labels int64 and on the device of their embeddings.

    Labels that are still on the host are looked up in the tree there, so that a wrong one is named, and move without
    anyone waiting for the device. With None for the tree none is wrong. What was one object stays one: PML tells by that
    whether there is a reference set.

    Raises:
        ValueError: missing labels, wrong shapes, different lengths or embedding sizes, or a label on the host that the
            fitted tree does not know.
        TypeError: embeddings that are not floats or of two types, labels that are not integers.
    """
    check_embeddings(embeddings)
    ready_embeddings = _at_least_float32(embeddings)
    ready_labels = _ready_labels(tree, labels, embeddings)
    if ref_emb is None:
        return ready_embeddings, ready_labels, None, None
    check_embeddings(ref_emb, "ref_emb", embeddings.shape[1])
    ready_ref = ready_embeddings if ref_emb is embeddings else _at_least_float32(ref_emb)
    if ready_ref.dtype != ready_embeddings.dtype:
        raise TypeError(f"embeddings are {embeddings.dtype}, but ref_emb is {ref_emb.dtype}; give both in one type")
    if ref_labels is labels and len(ref_emb) == len(embeddings):
        return ready_embeddings, ready_labels, ready_ref, ready_labels
    return ready_embeddings, ready_labels, ready_ref, _ready_labels(tree, ref_labels, ref_emb, ("ref_labels", "ref_emb"))


def prepare_indices(indices_tuple: Any, num_anchors: int, num_refs: int, device: torch.device) -> Mined:
    """A tuple of mined indices as int64 on `device`: (anchors, positives, negatives) or (anchors, positives, anchors,
    negatives), anchors in a batch of `num_anchors`, others in `num_refs`.

    Raises:
        ValueError: another number of parts, other shapes, parts of several lengths, or (where looking is free) an index
            outside of the batch.
        TypeError: anything else than tensors of integers.
    """
    names = NAMES_OF_INDICES.get(len(indices_tuple)) if isinstance(indices_tuple, (tuple, list)) else None
    if names is None:
        given = f"{len(indices_tuple)} parts" if isinstance(indices_tuple, (tuple, list)) else type(indices_tuple).__name__
        raise ValueError(
            "indices_tuple must be (anchors, positives, negatives) or (anchors, positives, anchors, negatives), "
            f"but got {given}"
        )
    ready = []
    for name, index in zip(names, indices_tuple, strict=True):
        if not isinstance(index, torch.Tensor) or (index.numel() and not _is_of_integers(index)):
            kind = index.dtype if isinstance(index, torch.Tensor) else type(index).__name__
            raise TypeError(f"the {name} of indices_tuple must be a tensor of integers, but got {kind}")
        if index.ndim != 1:
            raise ValueError(f"the {name} of indices_tuple must be of shape (T,), but are {tuple(index.shape)}")
        size = num_anchors if name == "anchors" else num_refs
        if index.device.type == "cpu" and len(index) and not 0 <= index.min() <= index.max() < size:
            raise ValueError(
                f"the {name} of indices_tuple must be within 0 .. {size - 1}, but there are {int(index.min())} and "
                f"{int(index.max())}; were they mined in another batch?"
            )
        ready.append(index.to(device, torch.int64))
    groups = [ready] if len(ready) == 3 else [ready[:2], ready[2:]]
    if any(len({len(index) for index in group}) > 1 for group in groups):
        lengths = ", ".join(str(len(index)) for index in ready)
        raise ValueError(f"the parts of indices_tuple that belong together must be equally long, but they are {lengths}")
    if len(ready) == 3:
        return ready[0], ready[1], ready[2]
    return ready[0], ready[1], ready[2], ready[3]


def _is_of_integers(values: torch.Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _ready_labels(
    tree: ClassTree | None,
    labels: Labels | None,
    embeddings: torch.Tensor,
    names: tuple[str, str] = ("labels", "embeddings"),
) -> torch.Tensor:
    if labels is None:
        raise ValueError(f"{names[0]} are required, also with indices_tuple: the margins belong to class pairs")
    labels, device = label_tensor(labels), embeddings.device
    check_lengths(embeddings, labels, names[1])
    if labels.device == device:
        return labels
    if labels.device.type == "cpu":
        if tree is not None:
            tree.check_labels(labels)
        if device.type == "cuda" and not torch.compiler.is_compiling():  # which cannot trace it
            return labels.pin_memory().to(device, non_blocking=True)
    return labels.to(device)


def _at_least_float32(embeddings: torch.Tensor) -> torch.Tensor:
    return embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings
