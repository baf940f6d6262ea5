"""What the state machines share: each call ends as expected, its end is counted, and a refused one has changed nothing."""

import faulthandler
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine

import pml_htl

PACKAGE = str(Path(pml_htl.__file__).parent)
SECONDS_PER_CALL = 60  # nothing hangs: a call that takes longer ends the process with all its stacks
BRIEF = settings(max_examples=12, stateful_step_count=12, deadline=None)
CALLS: Counter = Counter()  # (machine, call, how it ended)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C at a line that the test has chosen."""


class Hostile(RuleBasedStateMachine):
    """A machine has a `snapshot` of everything that a refused call must leave as it was."""

    def snapshot(self):
        raise NotImplementedError

    def attempt(self, name, call, refusal=None):
        """The result of a call; None if it was to be refused, with an error type and a part of the message, and was."""
        before = self.snapshot()
        faulthandler.dump_traceback_later(SECONDS_PER_CALL, exit=True, file=sys.__stderr__)
        try:
            result = call()
            ended = "done"
        except BaseException as error:
            ended = type(error).__name__
            if refusal is None or not isinstance(error, refusal[0]):
                raise
            assert re.search(refusal[1], str(error), re.DOTALL), f"{name}: {refusal[1]!r} is not in {error}"
            assert same(before, self.snapshot()), f"{name} was refused, but has changed something"
            result = None
        else:
            assert refusal is None, f"{name} was not refused with {refusal}"
        finally:
            faulthandler.cancel_dump_traceback_later()
        CALLS[type(self).__name__, name, ended] += 1
        return result

    def interrupted(self, name, call, line):
        """Whether Ctrl-C came at that line of the package; if not, the call was over before."""
        try:
            with ctrl_c(line):
                call()
        except Interrupted:
            CALLS[type(self).__name__, f"{name}, Ctrl-C", "KeyboardInterrupt"] += 1
            return True
        CALLS[type(self).__name__, f"{name}, Ctrl-C", "done"] += 1
        return False


class ctrl_c:
    """Raises `Interrupted` when the package is about to run its n-th line from now."""

    def __init__(self, line):
        self.lines_left = line

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._enter)

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _enter(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.lines_left -= 1
            if self.lines_left == 0:
                raise Interrupted
        return self._line


def same(one, other):
    """Whether two snapshots are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
