"""Seconds and bytes of contenders: timed in turns in one process, memory in a process of its own for each."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cases import Case, Contender

SAMPLE_SECONDS = 0.02  # short work is done several times in a row for one sample
SECONDS = 2.0  # for each contender, as far as the number of samples allows
MIN_SAMPLES, MAX_SAMPLES = 3, 15
LONG = 60.0  # from here on one sample will do
MIB = 2**20


def time_in_turns(contenders: list[Contender]) -> dict[str, list[float]]:
    """Seconds of one unit of work, several samples for each contender, which take turns.

    Each runs once before, so that nothing is timed cold; if that takes minutes it is the sample.
    """
    plans: dict[str, tuple[int, int]] = {}  # calls in a sample, samples
    found: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        seconds = _time(contender.run, 1)
        if seconds >= LONG:
            found[contender.name].append(seconds / contender.repeats)
            continue
        seconds = min(seconds, _time(contender.run, 1)) if seconds < 1 else seconds
        calls = max(1, round(SAMPLE_SECONDS / seconds))
        plans[contender.name] = calls, int(np.clip(SECONDS / (seconds * calls), MIN_SAMPLES, MAX_SAMPLES))
    for turn in range(MAX_SAMPLES):
        for contender in contenders:
            calls, samples = plans.get(contender.name, (0, 0))
            if turn < samples:
                found[contender.name].append(_time(contender.run, calls) / contender.repeats)
    return found


def _time(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def peak_memory(case: Case, name: str, device: str, threads: int) -> dict[str, float | None]:
    """MiB of one run of a contender in a new process: `extra_mib` above what was there before, `process_mib` in all.

    On a GPU that is its memory, and `process_mib` None. Without Linux's accounts `extra_mib` is None.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(case, name, device, threads, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{name} ended without an answer while its memory was measured at {case}") from None
    finally:
        process.join()
    return found


def _measure_peak(case: Case, name: str, device: str, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    (contender,) = (contender for contender in case.contenders(device, check=False) if contender.name == name)
    # What a first call loads once is not the contender's; a tree is too dear to be fitted twice for that.
    if case.part != "tree":
        contender.run()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        contender.run()
        sender.send({"extra_mib": (torch.cuda.max_memory_allocated(device) - allocated) / MIB, "process_mib": None})
        return
    with suppress(OSError, AttributeError):  # hands freed memory back, so that using it again counts
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    peak_before, before = _resident("VmHWM"), _resident("VmRSS")
    contender.run()
    peak = _resident("VmHWM")
    # The kernel's accounts lag behind a little, so that the peak of nothing may lie below what was there.
    extra = None if peak is None or before is None else max(0.0, peak - before)
    sender.send({"extra_mib": extra, "process_mib": max(filter(None, (peak, peak_before)), default=None)})


def _resident(name: str) -> float | None:
    if not sys.platform.startswith("linux"):
        return None
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**10
