"""Properties of this machine for MLX."""

from __future__ import annotations

import mlx.core as mx


def auto_dtype() -> str:
    """Return the dtype of ``--dtype auto`` here."""
    return "bfloat16" if mx.metal.is_available() else "float32"
