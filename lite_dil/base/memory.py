"""The memory of this machine and of this process: what is free, the peak, and what becomes of what is freed."""

from __future__ import annotations

import math
import platform
import sys
from typing import NamedTuple

GIB = 2**30


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


def on_wsl(release: str | None = None) -> bool:
    """Return whether this is Linux inside Windows, by the kernel's release."""
    return "microsoft" in (platform.release() if release is None else release).lower()


def expandable_segments() -> bool:
    """Return whether torch's segments of a GPU's memory may grow on this system.

    Windows has no such segments. On WSL the first allocation fails on some cards ("CUDA driver error: unknown error",
    https://github.com/pytorch/pytorch/issues/192330).
    """
    return sys.platform == "linux" and not on_wsl()


class Memory(NamedTuple):
    """What training may take.

    Attributes:
        usable: bytes of the GPU's memory, or of the computer's where that is one with it.
        text: a few words for people on where the number is from.
        host: bytes of the computer's own memory beside those of an NVIDIA GPU; infinite where it is not limited.
    """

    usable: int
    text: str
    host: float = math.inf

    def holds(self, total: int, host: int) -> bool:
        """Return whether there is room for `total` bytes, and for `host` in the computer's own memory."""
        return total <= self.usable and host <= self.host

    def part(self, share: float) -> Memory:
        """Return this with a share of the GPU's memory alone."""
        return self._replace(usable=int(share * self.usable))


def available() -> int:
    """Return the bytes of the computer's memory that are free or can be freed."""
    import psutil

    return int(psutil.virtual_memory().available)
