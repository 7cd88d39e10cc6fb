"""Rewards by the user's Python function, with the signature of TRL's reward functions."""

from __future__ import annotations

import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

from lite_dil.base.errors import UserError, first_line
from lite_dil.objectives.naming import CannotName, identify, place_of
from lite_dil.rewards.source import Answered

if TYPE_CHECKING:
    import numpy as np

TIMEOUT = 60.0  # seconds of a call, by default


def identity_of(function: Callable[..., Any]) -> str:
    """Return a digest of what a function computes, 12 hexadecimal digits. Raises UserError if part of it is out of reach."""
    if not isinstance(function, (FunctionType, BuiltinFunctionType, functools.partial)):
        raise UserError(
            f"--reward {place_of(function)}: it is a callable {type(function).__name__}, and a resumed run could not detect "
            "that it changed; give a function, or functools.partial(function, ...) with its settings"
        )
    try:
        return identify([function], None)
    except CannotName as error:
        raise UserError(
            f"--reward {place_of(function)}: {error}, so a resumed run could not detect a changed reward; move it into the "
            "function"
        ) from None


class _Failed(Exception):
    """The user's function raised `error`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _NoNumbers(Exception):
    """The user's function returned something else than numbers."""


class FunctionSource:
    """Calls ``function(prompts, completions, **columns)``, which returns one number for each completion.

    As in TRL, prompts and completions are texts; of a chat they are lists of messages, the completion's with the assistant's
    only. ``completion_ids`` are the completions' tokens, with the end token if there is one. Each other column of the rows is
    a list with an entry for each completion. A function without ``**kwargs`` is given those of them only that it names.

    Args:
        timeout: seconds that a call may take.
    """

    def __init__(self, name: str, function: Callable[..., Any], timeout: float = TIMEOUT) -> None:
        self.name, self._function, self._timeout = name, function, timeout

    def rewards(self, answers: Sequence[Answered]) -> np.ndarray:
        """Return the reward of each response, (answers,).

        Raises UserError if the function fails, takes too long, or returns something else than a number for each response.
        """
        import numpy as np

        try:
            values = self._call(answers)
        except _Failed as failed:
            error = failed.error
            raise UserError(
                f"--reward {self.name}: {type(error).__name__}: {first_line(error)}{_advice(error)}{self._where(answers)}"
            ) from error
        if len(values) != len(answers):
            raise UserError(
                f"--reward {self.name} returned {len(values)} numbers for {len(answers)} completions; expected one for each"
            )
        for value, each in zip(values, answers, strict=True):
            if not math.isfinite(value):
                raise UserError(f"--reward {self.name} returned {value} for {each.place}: {each.response[:80]!r}")
        return np.array(values, np.float64)

    def _call(self, answers: Sequence[Answered]) -> list[float]:
        """Call the function in a thread, so that one that hangs can be left behind; raise `_Failed` if it raises."""
        arguments, result = self._arguments(answers), list[Any]()

        def work() -> None:
            try:
                result.append(_numbers(self._function(**arguments)))  # here, since a generator runs the user's code
            except BaseException as error:  # whatever the user's function raises, SystemExit too; it is reported below
                result.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(min(self._timeout, threading.TIMEOUT_MAX))
        if not result:
            raise UserError(
                f"--reward {self.name} took longer than {self._timeout:g} s for {len(answers)} completions; make it faster, "
                "or give more time with --reward-timeout"
            )
        (found,) = result
        if isinstance(found, _NoNumbers):
            raise UserError(f"--reward {self.name} returned {found}; expected a list of numbers")
        if isinstance(found, BaseException):
            raise _Failed(found)
        return list(found)

    def _arguments(self, answers: Sequence[Answered]) -> dict[str, Any]:
        names = dict.fromkeys(name for each in answers for name in each.columns)
        if taken := {"prompts", "completions", "completion_ids"} & names.keys():
            raise UserError(
                f"--reward {self.name}: the data has a column {min(taken)!r}, which the function gets from the model; "
                "rename it"
            )
        arguments = {
            "prompts": [each.prompt if each.messages is None else deepcopy(list(each.messages)) for each in answers],
            "completions": [
                each.response if each.messages is None else [{"role": "assistant", "content": each.response}]
                for each in answers
            ],
            "completion_ids": [list(each.response_ids) for each in answers],
            # Copies, since the function may change what it is given.
            **{name: [deepcopy(each.columns.get(name)) for each in answers] for name in names},
        }
        parameters = inspect.signature(self._function).parameters
        wanted = {name: each for name, each in parameters.items() if each.kind is not inspect.Parameter.VAR_POSITIONAL}
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in wanted.values()):
            return arguments
        missing = [name for name, each in wanted.items() if each.default is each.empty and name not in arguments]
        if missing:
            raise UserError(
                f"--reward {self.name} takes {missing[0]!r}, and the data has no such column; it has "
                f"{', '.join(names) or 'none besides the prompt'}"
            )
        return {name: value for name, value in arguments.items() if name in wanted}

    def _where(self, answers: Sequence[Answered]) -> str:
        """Return where the first response is on which the function fails by itself, for a message; give up when it is slow."""
        began = time.monotonic()
        for each in answers:
            if time.monotonic() - began > self._timeout:
                break
            try:
                self._call([each])
            except _Failed:  # with the same error, or another one
                return f" ({each.place}: {each.response[:80]!r})"
        return ""


def _numbers(found: Any) -> list[float]:
    """Return what a function returned as numbers. Raises _NoNumbers if it is no list of them, in an order."""
    if isinstance(found, str | bytes | Mapping | Set) or not isinstance(found, Iterable):
        raise _NoNumbers(repr(found)[:80])
    values = list(found)
    if any(isinstance(value, str | bytes) for value in values):
        raise _NoNumbers(repr(values)[:80])
    try:
        return [_float(value) for value in values]
    except (TypeError, ValueError):
        raise _NoNumbers(repr(values)[:80]) from None


def _float(value: Any) -> float:
    """Return a number as a float; an infinity for an integer that no float holds. Raises TypeError or ValueError."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _advice(error: BaseException) -> str:
    """Return what to do about an error that is due to how the function is called."""
    if isinstance(error, ValueError) and "signal" in str(error):  # Python's own message, and math_verify's
        return (
            ". The function uses signals, and is called in a thread that --reward-timeout can leave; turn off its own time "
            "limit (math_verify: parsing_timeout=None and timeout_seconds=None)"
        )
    return ""
