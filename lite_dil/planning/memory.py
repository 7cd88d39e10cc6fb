"""What training may take of a device's memory: one of a given size, or this machine's."""

from __future__ import annotations

import importlib.util
import os
import subprocess

from lite_dil.base.errors import UserError
from lite_dil.base.memory import GIB, Memory, available

# A process with CUDA holds this much for its context and kernels before the first tensor; it differs by card and driver.
CUDA_CONTEXT = 6 * GIB // 10
LIBRARIES = GIB // 2  # Python, torch and transformers in the computer's memory


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
    if backend == "mlx" and importlib.util.find_spec("mlx") is not None:
        from lite_dil.backends.mlx.memory import metal_memory

        if found := metal_memory():
            return found
    free = available()
    return Memory(max(0, free - LIBRARIES), f"{free / GIB:.1f} GB available here, about 0.5 GB of it for Python and torch")


def _cuda_memory() -> Memory:
    if importlib.util.find_spec("torch") is not None:
        from lite_dil.backends.torch.memory import cuda_memory

        if seen := cuda_memory():
            return seen
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
