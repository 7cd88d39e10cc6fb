"""What the tests of the objectives share: values and gradients in each library, and derivatives to hold them against."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from lite_dil.objectives import table as objectives
from lite_dil.objectives.table import OBJECTIVES


def constants(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The table's defaults but for `options`, as a run without flags has them."""
    none: dict[str, Any] = dict.fromkeys(["beta", *OBJECTIVES[name].options])
    return objectives.constants(name, SimpleNamespace(**{**none, **options}))


def values(loss: Callable[[Any], Any], x: np.ndarray) -> dict[str, np.ndarray]:
    """The value in each library: numpy in float64, the others in float32."""
    return {
        "numpy": np.asarray(loss(x)),
        "torch": loss(torch.tensor(x, dtype=torch.float32)).numpy(),
        "mlx": np.array(loss(mx.array(x.astype(np.float32)))),
    }


def gradients(loss: Callable[[Any], Any], x: np.ndarray) -> dict[str, np.ndarray]:
    """The gradient of the summed loss in float32."""
    leaf = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    return {
        "torch": torch.autograd.grad(loss(leaf).sum(), leaf)[0].numpy(),
        "mlx": np.array(mx.grad(lambda x: loss(x).sum())(mx.array(x.astype(np.float32)))),
    }


def slope(loss: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    """The derivative of an elementwise function in float64."""
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0].numpy()


def complex_step(function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    """The derivative of an analytic function to machine precision: Im f(x + ih) / h has no difference to cancel in."""
    return function(x + 1e-30j).imag / 1e-30
