"""Trainings side by side, each in a process of its own with its share of the cores."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from ..data import Splits

Submit = Callable[..., Future[Any]]  # submit(work, *arguments): a future of work(data, *arguments)
Told = Callable[[Any], None]
_data: Splits | None = None  # of a worker process, which gets it once and not with every training


def _nobody(news: Any) -> None:
    """Listens to what work tells."""


_told: Told = _nobody


@contextmanager
def workers(data: Splits, jobs: int, told: Told = _nobody) -> Iterator[Submit]:
    """A function that submits work on `data`, done by `jobs` processes; with one job at once, in this process.

    `told` is called in this process, by another thread if there are several jobs, with whatever the work tells.
    """
    if jobs == 1:
        with _listening(told):
            yield lambda work, *arguments: _done(work, data, *arguments)
        return
    context = multiprocessing.get_context("spawn")  # forked threads of torch would hang
    threads = max(1, (os.cpu_count() or 1) // jobs)
    news = context.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(news, told), daemon=True)
    listener.start()
    with ProcessPoolExecutor(jobs, context, _start_worker, (data, threads, news)) as pool:
        try:
            yield lambda work, *arguments: pool.submit(_work, work, *arguments)
        finally:  # after an error nobody wants what is left
            pool.shutdown(wait=False, cancel_futures=True)
    news.put(None)
    listener.join(timeout=1)  # a worker that was killed may have left half a message


def tell(news: Any) -> None:
    """From within work: tells those who gave it."""
    _told(news)


def quiet() -> None:
    """PML's trainers and testers write a progress bar each, and say much; the comparison says what matters."""
    os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger("PML").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")  # PML's trainer


@contextmanager
def _listening(told: Told) -> Iterator[None]:
    global _told
    _told = told
    try:
        yield
    finally:
        _told = _nobody


def _listen(news: SimpleQueue[Any], told: Told) -> None:
    for message in iter(news.get, None):
        told(message)


def _done(work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(work(*arguments))
    return future


def _start_worker(data: Splits, threads: int, news: SimpleQueue[Any]) -> None:
    global _data, _told
    _data, _told = data, news.put
    torch.set_num_threads(threads)
    quiet()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers outlive a parent that is killed, and would train on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _work(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(_data, *arguments)
