"""Evaluating a function of arrays on torch, without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def value_and_slope(
    backend: str,
    function: Callable[..., Any],
    policy: np.ndarray,
    reference: np.ndarray,
    inputs: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """See `lite_dil.backends.registry.value_and_slope`."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(backend)

    given = tensor(policy).requires_grad_()
    value = function(given, tensor(reference), {name: tensor(array) for name, array in inputs.items()})
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"it returned a {type(value).__name__}, not a torch.Tensor")
    (slope,) = torch.autograd.grad(value.sum(), given, allow_unused=True)
    slope = torch.zeros_like(given) if slope is None else slope
    return value.detach().cpu().numpy(), slope.cpu().numpy()
