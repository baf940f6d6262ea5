"""Tells how far a training is, while it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..common.progress import News

EVERY = 0.5  # seconds


class Reporter:
    """Hooks of PML's trainers that tell the news: twice a second, and after each evaluation.

    Args:
        title: of the training.
        tell: is called with the news.
    """

    def __init__(self, title: str, tell: Callable[[News], None]) -> None:
        self.title = title
        self.tell = tell
        self.best: float | None = None
        self._loss: Any = 0.0
        self._told = -EVERY

    def end_of_iteration(self, trainer: Any) -> None:
        """After each iteration."""
        self._loss = trainer.losses["total_loss"].detach()  # a number only when it is told: on a GPU that waits
        if time.perf_counter() - self._told >= EVERY:
            self._tell(trainer, evaluated=False)

    def evaluated(self, trainer: Any, best: float) -> None:
        """After each evaluation, with the best accuracy so far."""
        self.best = best
        self._tell(trainer, evaluated=True)

    def _tell(self, trainer: Any, evaluated: bool) -> None:
        self._told = time.perf_counter()
        self.tell(News(self.title, trainer.get_global_iteration() + 1, float(self._loss), self.best, evaluated))
