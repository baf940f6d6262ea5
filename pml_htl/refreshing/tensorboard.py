"""What TensorBoard gets of each new tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from .. import plots
from ..distributed import Ranks
from ..tree import ClassTree
from .embedding import Sample, evenly_spaced

MOST_SAMPLES = 1000  # TensorBoard holds them in the browser


class TensorBoard:
    """A picture of each new tree, its confusable pairs as text, and a sample's embeddings for the projector.

    Args:
        writer, sample: `tensorboard_writer` and `tensorboard_sample` of `TreeRefresh`, which says what they are and what
            errors they raise.
    """

    def __init__(self, writer: Any, sample: Dataset[Any] | None) -> None:
        plots.require_matplotlib()
        if not all(hasattr(writer, name) for name in ("add_figure", "add_text", "add_embedding")):
            raise TypeError(f"tensorboard_writer must be a SummaryWriter, but it is {writer!r}")
        if sample is not None:
            if not hasattr(sample, "__getitem__") or not hasattr(sample, "__len__"):
                raise TypeError(f"tensorboard_sample must be a data set with a length, but it is {sample!r}")
            if len(sample) == 0:
                raise ValueError("tensorboard_sample is empty; give a data set of validation, say")
        self.writer = writer
        self.sample = sample

    def add(self, tree: ClassTree, step: int, ranks: Ranks, embed: Callable[[Dataset[Any]], Sample]) -> None:
        """Adds the tree, and on the first process what `embed` makes of the sample."""
        plots.add_to_tensorboard(tree, self.writer, step)
        if self.sample is not None and ranks.rank == 0:
            plots.add_sample_to_tensorboard(*embed(evenly_spaced(self.sample, MOST_SAMPLES)), self.writer, step)
