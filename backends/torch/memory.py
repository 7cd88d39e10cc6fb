"""The memory of the GPU that torch sees."""

from __future__ import annotations

import torch

from lite_dil.backends.torch import out_of_memory
from lite_dil.base.memory import GIB, Memory


def cuda_memory() -> Memory | None:
    """Return what is free of the GPU's memory, or None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()  # CUDA's own share is taken already
    return Memory(free, f"{torch.cuda.get_device_name()}, {free / GIB:.1f} of {total / GIB:.1f} GB free")


def free() -> None:
    """Give back what nobody holds, garbage in cycles too."""
    out_of_memory.free(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
