"""What training may take of a device's memory: one of a given size, or this machine's."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

from lite_dil.base.errors import UserError
from lite_dil.base.memory import GIB, Memory, available

_T = TypeVar("_T")

# A process with CUDA holds this much for its context and kernels before the first tensor; it differs by card and driver.
CUDA_CONTEXT = 6 * GIB // 10
LIBRARIES = GIB // 2  # Python, torch and transformers in the computer's memory
SYSTEM = GIB  # of a computer's memory, for its system and what else runs there: a guess


def memory_of(size: float, backend: str, host: float | None = None) -> Memory:
    """Return what training may take of a card, or of a computer, of `size` times 2^30 bytes.

    Args:
        host: the memory of the computer that the card is in, in the same unit; None does not limit it.
    """
    whole = int(size * GIB)
    if backend == "cuda":
        memory = Memory(max(0, whole - CUDA_CONTEXT), f"a GPU of {size:g} GB, about 0.6 GB of it for CUDA itself")
        return memory if host is None else _in_computer(memory, host)
    if backend == "mlx":
        return Memory(whole * 3 // 4, f"a Mac of {size:g} GB, three quarters of it for the GPU")
    return Memory(max(0, whole - LIBRARIES), f"{size:g} GB, about 0.5 GB of it for Python and torch")


def memory_here(backend: str, host: float | None = None) -> Memory:
    """Return what training may take on this machine now. Raises UserError where that cannot be found out.

    Args:
        host: as `memory_of` takes it; None takes what is free.
    """
    if backend == "cuda":
        memory = _cuda_memory()
        if host is not None:
            return _in_computer(memory, host)
        free = available()
        return memory._replace(host=free, text=f"{memory.text}; {free / GIB:.1f} GB of the computer's memory available")
    if backend == "mlx" and importlib.util.find_spec("mlx") is not None:
        from lite_dil.backends.mlx.memory import metal_memory

        if found := metal_memory():
            return found
    free = available()
    return Memory(max(0, free - LIBRARIES), f"{free / GIB:.1f} GB available here, about 0.5 GB of it for Python and torch")


def _in_computer(memory: Memory, size: float) -> Memory:
    text = f"{memory.text}; a computer of {size:g} GB, about 1 GB of it for its system"
    return memory._replace(host=max(0, int(size * GIB) - SYSTEM), text=text)


def _cuda_memory() -> Memory:
    if importlib.util.find_spec("torch") is not None:
        from lite_dil.backends.torch.memory import cuda_memory

        if seen := cuda_memory():
            return seen
    if found := nvidia_gpu():
        name, free, total = found
        text = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GB free, about 0.6 GB of it for CUDA itself"
        return Memory(max(0, free - CUDA_CONTEXT), text)
    raise UserError("no NVIDIA GPU is found here; say how much memory the card has with --memory GB")


def nvidia_gpu() -> tuple[str, int, int] | None:
    """Return name, free and total bytes of the GPU that CUDA would take first, by its driver, or None if there is none."""
    # CUDA takes the devices up to the first that does not exist: none of "", "-1" or "none".
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()

    def found(pynvml: Any) -> tuple[str, int, int]:
        gpu = _gpu(first)
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        return pynvml.nvmlDeviceGetName(gpu), memory.free, memory.total

    return _ask_driver(found)


def nvidia_driver() -> str:
    """Return the version of the NVIDIA driver, or nothing if there is none."""
    return _ask_driver(lambda pynvml: str(pynvml.nvmlSystemGetDriverVersion())) or ""


def _ask_driver(ask: Callable[[Any], _T]) -> _T | None:
    """Return what `ask` gets from NVML, or None if there is no driver or no such device."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return ask(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _gpu(name: str) -> Any:
    """Return the device of an entry of CUDA_VISIBLE_DEVICES. Raises NVMLError where there is none."""
    import pynvml

    if name.startswith("MIG-"):
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        # The start of a UUID is enough for CUDA.
        if name == str(index) or (name.startswith("GPU-") and pynvml.nvmlDeviceGetUUID(gpu).startswith(name)):
            return gpu
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
