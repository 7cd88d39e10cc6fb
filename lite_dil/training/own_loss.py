"""Try a user-defined loss on a backend's arrays before training."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from lite_dil.backends import registry
from lite_dil.base.errors import UserError, first_line
from lite_dil.objectives.naming import place_of
from lite_dil.objectives.own import OwnLoss

# Log-ratios of four responses per side; training starts at 0.
TRIED = np.array([[0.0, 0.5, -0.3, 0.1], [0.0, -0.2, 0.4, -0.1]], np.float32)


def try_out(loss: OwnLoss, backend: str) -> None:
    """Try the loss on four made-up values per side, as arrays of the backend's library.

    Raises UserError, which names the function, unless it returns one finite value with a finite gradient for each input,
    independent of the others.
    """
    if loss.kind == "pairs":
        _try(loss, backend, loss.functions[0], lambda function, f: function(f[0], f[1]), TRIED)
    else:
        for function, values in zip(loss.functions, TRIED, strict=False):
            _try(loss, backend, function, lambda function, f: function(f[0]), values[None])


def _try(loss: OwnLoss, backend: str, function: Callable[..., Any], call: Callable[..., Any], values: np.ndarray) -> None:
    def run(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            return registry.value_and_slope(backend, lambda f, *_: call(function, f), f, f, {})
        except Exception as error:  # the user's function may raise anything
            raise UserError(f"{_of(loss, function)} {type(error).__name__}: {first_line(error)}{_line(error)}") from error

    found, slope = run(values)
    if found.shape != (values.shape[1],):
        expected = f"one value per pair or response, {(values.shape[1],)}"
        raise UserError(f"{_of(loss, function)} it returned an array of shape {found.shape}; expected {expected}")
    if not (np.isfinite(found).all() and np.isfinite(slope).all()):
        what = "values" if not np.isfinite(found).all() else "slopes"
        raise UserError(f"{_of(loss, function)} {what} that are not finite: {found.tolist()}, slopes {slope.tolist()}")
    halves = np.concatenate([run(np.ascontiguousarray(part))[0] for part in np.split(values, 2, axis=1)])
    if not np.allclose(halves, found, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"{_of(loss, function)} the loss of a response depends on the other responses ({found.tolist()} together, "
            f"{halves.tolist()} in halves), and a step may be split anywhere; leave means and sums to lite-dil"
        )
    if function is loss.functions[0] and not slope.any():
        raise UserError(f"{_of(loss, function)} its gradient is 0 everywhere, so nothing would be learned")


def _of(loss: OwnLoss, function: Callable[..., Any]) -> str:
    return f"--loss {loss.name}, {place_of(function)}, tried on log-ratios of four responses:"


def _line(error: BaseException) -> str:
    """Return the line of the innermost call, if it is not the function's own."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" (in {frames[-1].filename} line {frames[-1].lineno})" if frames else ""
