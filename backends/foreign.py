"""Call the model's own code, which may reject its arguments; this library's own errors are told apart."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from lite_dil.base.errors import first_line

_LIBRARIES = ("mlx", "numpy")  # an error in them is the caller's


class Misfit(Exception):
    """The model's code does not accept its arguments; the text says why."""


def foreign(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the model's own code.

    Raises:
        Misfit: that code raised an error, or cannot be called like this. Errors from this library's own code, called back from
            there, pass through.
    """
    try:
        return function(*args, **kwargs)
    except Misfit:
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        raise Misfit(f"its code does not accept it ({type(error).__name__}: {first_line(error)})") from error


def _is_ours(error: Exception) -> bool:
    """Return whether the code that raised the error, libraries aside, is this library's; `foreign` itself does not count."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frame = next(f for f in reversed(frames) if f.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES)
    return frame.f_globals.get("__name__", "").startswith("lite_dil.") and frame.f_code is not foreign.__code__
