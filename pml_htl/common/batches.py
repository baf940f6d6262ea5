"""What a batch is: embeddings (B, D) of floats and one label for each."""

from __future__ import annotations

from typing import Any

import torch


def check_embeddings(embeddings: Any, name: str = "embeddings", size: int | None = None) -> None:
    """Raises unless these are dense floats of shape (B, D), of D = `size` if that is given.

    Raises:
        TypeError: no tensor, a sparse one, or one of other numbers.
        ValueError: another shape.
    """
    if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
        given = embeddings.dtype if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        raise TypeError(f"{name} must be a tensor of floats, but got {given}")
    if embeddings.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but got one of layout {embeddings.layout}; see to_dense()")
    if embeddings.ndim != 2 or size not in (None, embeddings.shape[1]):
        wanted = "D" if size is None else size
        raise ValueError(f"{name} must be of shape (B, {wanted}), but they are {tuple(embeddings.shape)}")


def check_lengths(embeddings: torch.Tensor, labels: torch.Tensor, name: str = "embeddings") -> None:
    """Raises a `ValueError` unless there is one label (B,) per embedding (B, D)."""
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"there must be one label per embedding: {len(embeddings)} {name}, labels of shape {tuple(labels.shape)}"
        )


def joint_shape(a: torch.Tensor, b: torch.Tensor) -> torch.Size:
    """The shape that labels of two shapes broadcast to; a `ValueError` if they don't."""
    try:
        return torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"labels of shapes {shapes} do not broadcast; for all pairs give (B, 1) and (R,)") from None
