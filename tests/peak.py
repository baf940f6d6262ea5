"""The peak memory of a process, for tests that measure it in one of their own."""

import resource
import sys


def peak():
    """Bytes."""
    if not sys.platform.startswith("linux"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # There ru_maxrss will not do: a new process inherits it from the one that started it.
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 2**10
