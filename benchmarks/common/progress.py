"""What shows how far a long command has come: bars in a terminal, lines in a log."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(console: Console) -> Progress:
    """What, how far, how many of how many, and the time passed and left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


@dataclass(frozen=True)
class News:
    """How far a training is."""

    title: str
    iteration: int  # done
    loss: float
    best: float | None  # validation MAP@R so far, in 0..1; None before the first evaluation
    evaluated: bool  # just now


class TrainingsProgress:
    """Shows all trainings of a command, with a bar for each that runs, or in a log with a line for each evaluation.

    Args:
        console: where.
        count, iterations: how many trainings, of so many iterations each.
    """

    def __init__(self, console: Console, count: int, iterations: int) -> None:
        self.iterations = iterations
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        # The time left is by the speed of the last minutes, which methods and evaluations change.
        self._progress = Progress(
            *columns, console=console, disable=not console.is_terminal, speed_estimate_period=300, transient=True
        )
        self._all = self._progress.add_task(f"{count} trainings", total=count * iterations, state="")
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}  # iterations by title, also of trainings that have ended

    def __enter__(self) -> TrainingsProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def told(self, news: News) -> None:
        """Shows it."""
        state = f"loss {news.loss:.3g}" + ("" if news.best is None else f", best {news.best:.1%}")
        if news.title not in self._tasks:
            self._tasks[news.title] = self._progress.add_task(news.title, total=self.iterations, state=state)
        self._progress.update(self._tasks[news.title], completed=news.iteration, state=state)
        self._count(news.title, news.iteration)
        if self._progress.disable and news.evaluated and news.best is not None:
            left = self._progress.tasks[0].time_remaining
            end = "" if left is None else f"; about {_minutes(left)} left for all"
            self._print(
                f"{news.title}: {news.iteration:,} of {self.iterations:,} iterations, loss {news.loss:.3g}, "
                f"best validation MAP@R {news.best:.1%}{end}"
            )

    def ended(self, title: str, outcome: str) -> None:
        """Prints the outcome of a training, whose bar goes."""
        self._count(title, self.iterations)
        if title in self._tasks:
            self._progress.update(self._tasks.pop(title), visible=False)
        self._print(f"{title}: {outcome}")

    def _count(self, title: str, iterations: int) -> None:
        self._done[title] = max(iterations, self._done.get(title, 0))  # news may come late
        self._progress.update(self._all, completed=sum(self._done.values()))

    def _print(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d} min"
