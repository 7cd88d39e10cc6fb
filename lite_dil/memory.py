"""The memory of this process: its peak, and what becomes of what is freed."""

from __future__ import annotations

import sys


def peak_rss_mb() -> float:
    """Return the largest resident set so far, in MiB."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def keep_freed_memory() -> None:
    """Let the C library hand freed blocks out again instead of returning each to the system, where that can be asked for.

    Activations come and go by the megabyte; on Linux every one of them is otherwise cleared page by page anew, a sixth of a
    step's time on two cores. The peak is the same.
    """
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none
    if mallopt is not None:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
