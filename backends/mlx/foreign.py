"""Calls of the model's own code, which may not take what it is handed; a mistake of ours is never taken for that."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from lite_dil.base.errors import first_line

_LIBRARIES = ("mlx", "numpy")  # theirs is the mistake of whoever called them


class Misfit(Exception):
    """The model's code does not take what it is handed; the text says why."""


def foreign(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the model's own code.

    Raises:
        Misfit: that code raised an error, or cannot be called like this. What this library's own code raises, called back from
            there, stays as it is.
    """
    try:
        return function(*args, **kwargs)
    except Misfit:
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        raise Misfit(f"its code does not take it ({type(error).__name__}: {first_line(error)})") from error


def _is_ours(error: Exception) -> bool:
    """Return whether the code that raised it, libraries left out, is this library's; `foreign` itself calls the model's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frame = next(f for f in reversed(frames) if f.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES)
    return frame.f_globals.get("__name__", "").startswith("lite_dil.") and frame.f_code is not foreign.__code__
