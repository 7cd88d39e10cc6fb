"""The memory of this machine and of this process: what is free, the peak, and what becomes of what is freed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from lite_dil.base.errors import UserError


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


GIB = 2**30
# A process with CUDA holds this much for its context and kernels before the first tensor; it differs by card and driver.
CUDA_CONTEXT = 6 * GIB // 10
LIBRARIES = GIB // 2  # Python, torch and transformers in the computer's memory


class Memory(NamedTuple):
    """Bytes that training may take, and a few words for people on where the number is from."""

    usable: int
    text: str


def memory_of(size: float, backend: str) -> Memory:
    """Return what training may take of a card, or of a computer, of `size` times 2^30 bytes."""
    whole = int(size * GIB)
    if backend == "cuda":
        return Memory(max(0, whole - CUDA_CONTEXT), f"a GPU of {size:g} GB, about 0.6 GB of it for CUDA itself")
    if backend == "mlx":
        return Memory(whole * 3 // 4, f"a Mac of {size:g} GB, three quarters of it for the GPU")
    return Memory(max(0, whole - LIBRARIES), f"{size:g} GB, about 0.5 GB of it for Python and torch")


def memory_here(backend: str) -> Memory:
    """Return what training may take on this machine now. Raises UserError where that cannot be found out."""
    if backend == "cuda":
        return _cuda_memory()
    if backend == "mlx" and (found := _metal_memory()):
        return found
    free = _available()
    return Memory(max(0, free - LIBRARIES), f"{free / GIB:.1f} GB available here, about 0.5 GB of it for Python and torch")


def _cuda_memory() -> Memory:
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()  # CUDA's own share is taken already
            return Memory(free, f"{torch.cuda.get_device_name()}, {free / GIB:.1f} of {total / GIB:.1f} GB free")
    if found := nvidia_smi():
        name, free, total = found
        text = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GB free, about 0.6 GB of it for CUDA itself"
        return Memory(max(0, free - CUDA_CONTEXT), text)
    raise UserError("no NVIDIA GPU is found here; say how much memory the card has with --memory GB")


def nvidia_smi() -> tuple[str, int, int] | None:
    """Return name, free and total bytes of the GPU that CUDA would take first, as nvidia-smi says; None where it cannot."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    command = ["nvidia-smi", "-i", first, "--query-gpu=memory.free,memory.total,name", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    parts = out.stdout.strip().split(", ", 2)
    if out.returncode or len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()):
        return None
    return parts[2], int(parts[0]) * 2**20, int(parts[1]) * 2**20


def _metal_memory() -> Memory | None:
    if importlib.util.find_spec("mlx") is None:
        return None
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    info = mx.device_info()
    usable, whole = int(info["max_recommended_working_set_size"]), int(info["memory_size"])
    return Memory(usable, f"{info['device_name']}, {usable / GIB:.1f} of {whole / GIB:.1f} GB for the GPU")


def _available() -> int:
    """Return the bytes of the computer's memory that are free or can be freed."""
    if importlib.util.find_spec("psutil") is not None:
        import psutil

        return int(psutil.virtual_memory().available)
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 2**10
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows, not on macOS
        raise UserError("how much memory is free cannot be found out without psutil: pip install psutil") from None
