"""The memory of the GPU that torch sees."""

from __future__ import annotations

import warnings

import torch

from lite_dil.backends.torch import out_of_memory
from lite_dil.base.memory import GIB, Memory, expandable_segments
from lite_dil.base.start import ALLOCATOR, EXPANDABLE, allocator_is_set


def cuda_memory() -> Memory | None:
    """Return what is free of the GPU's memory, or None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()  # CUDA's own share is taken already
    return Memory(free, f"{torch.cuda.get_device_name()}, {free / GIB:.1f} of {total / GIB:.1f} GB free")


def expand_segments() -> str:
    """Let segments of the GPU's memory grow where `lite_dil.base.start.start` came too late: torch was imported already.

    Returns a sentence for people where memory that is in use stays as it is, else nothing.
    """
    if allocator_is_set() or not expandable_segments() or torch.version.cuda is None or not torch.cuda.is_available():
        return ""
    # The first only forwards in later versions, with a warning that it will go.
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
        f"{reserved / GIB:.1f} GB of the GPU's memory were in use before, in segments that cannot grow: more is lost between "
        f"tensors than --auto counts on; set {ALLOCATOR}={EXPANDABLE} before torch is imported"
    )


def free() -> None:
    """Give back what nobody holds, garbage in cycles too."""
    out_of_memory.free(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def forget_peak() -> None:
    """Let the peak be that from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
