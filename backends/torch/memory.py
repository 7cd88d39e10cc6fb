"""Memory of the GPU that torch sees."""

from __future__ import annotations

import warnings

import torch

from lite_dil.backends.torch import out_of_memory
from lite_dil.base.memory import GIB, Memory, expandable_segments
from lite_dil.base.start import ALLOCATOR, EXPANDABLE, allocator_is_set


def cuda_memory() -> Memory | None:
    """Return the GPU's free memory, or None if torch sees no GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()  # without CUDA's own share
    return Memory(free, f"{torch.cuda.get_device_name()}, {free / GIB:.1f} of {total / GIB:.1f} GB free")


def expand_segments() -> str:
    """Make segments of the GPU's memory expandable if torch was imported before `lite_dil.base.start.start`.

    Returns a message if memory in use cannot be changed, else "".
    """
    if allocator_is_set() or not expandable_segments() or torch.version.cuda is None or not torch.cuda.is_available():
        return ""
    # In later versions the first only forwards, with a deprecation warning.
    change = getattr(torch.cuda.memory, "_set_allocator_settings", None)
    change = change or getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    reserved = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
    if change is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            change(EXPANDABLE)
    if change is not None and not reserved:
        return ""
    return (
        f"{reserved / GIB:.1f} GB of the GPU's memory were already in use, in segments that cannot grow: more is lost between "
        f"tensors than --auto counts on; set {ALLOCATOR}={EXPANDABLE} before torch is imported"
    )


def free() -> None:
    """Free unused memory, including garbage in cycles."""
    out_of_memory.free(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def forget_peak() -> None:
    """Reset the peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
