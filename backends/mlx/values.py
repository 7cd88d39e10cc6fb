"""Evaluate a function of arrays on MLX, without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from lite_dil.backends.mlx.inputs import as_mlx


def value_and_slope(
    backend: str,
    function: Callable[..., Any],
    policy: np.ndarray,
    reference: np.ndarray,
    inputs: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """See `lite_dil.backends.registry.value_and_slope`."""
    rest = as_mlx(reference), {name: as_mlx(array) for name, array in inputs.items()}

    def total(given: mx.array) -> tuple[mx.array, mx.array]:
        value = function(given, *rest)
        if not isinstance(value, mx.array):
            raise TypeError(f"it returned a {type(value).__name__}, not an mlx.core.array")
        return value.sum(), value

    (_, value), slope = mx.value_and_grad(total)(as_mlx(policy))
    return np.array(value), np.array(slope)
