"""The GPU that torch finds on this machine, and its compute types."""

from __future__ import annotations

import torch

from lite_dil.base.errors import UserError


def has_cuda() -> bool:
    """Return whether torch finds a CUDA GPU."""
    return torch.cuda.is_available()


def where(device: str) -> str:
    """Return the name of the GPU, or the number of the CPU's threads."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def compute_dtype(name: str, device: str) -> torch.dtype:
    """Return the type that --dtype means on this device."""
    if name == "auto" and device == "cuda":
        # By default torch also returns True if bf16 is emulated, as on a T4.
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        name = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    elif name == "float16" and device == "cpu":
        raise UserError("--dtype float16 is for GPUs; on a CPU use bfloat16 or float32")
    return getattr(torch, name)
