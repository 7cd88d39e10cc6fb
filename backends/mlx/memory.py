"""The memory of Apple's GPU."""

from __future__ import annotations

import gc

import mlx.core as mx

from lite_dil.base.memory import GIB, Memory


def metal_memory() -> Memory | None:
    """Return the memory that macOS recommends for the GPU, or None if there is no Metal."""
    if not mx.metal.is_available():
        return None
    info = mx.device_info()
    usable, whole = int(info["max_recommended_working_set_size"]), int(info["memory_size"])
    return Memory(usable, f"{info['device_name']}, {usable / GIB:.1f} of {whole / GIB:.1f} GB for the GPU")


def free() -> None:
    """Free unused memory, including garbage in reference cycles."""
    gc.collect()
    mx.clear_cache()


def forget_peak() -> None:
    """Let the peak be that from here on."""
    mx.reset_peak_memory()
