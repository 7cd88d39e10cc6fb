"""What MLX finds on this machine."""

from __future__ import annotations

import mlx.core as mx


def auto_dtype() -> str:
    """Return what ``--dtype auto`` is here."""
    return "bfloat16" if mx.metal.is_available() else "float32"
