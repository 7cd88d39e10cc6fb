"""Rewards by the user's Python function, with the signature of TRL's reward functions."""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Sequence
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
            found = self._call(answers)
        except UserError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise UserError(
                f"--reward {self.name}: {type(error).__name__}: {first_line(error)}{self._where(answers)}"
            ) from error
        try:
            values = [_float(value) for value in found]
        except (TypeError, ValueError):
            raise UserError(f"--reward {self.name} returned {repr(found)[:80]}; expected a list of numbers") from None
        if len(values) != len(answers):
            raise UserError(
                f"--reward {self.name} returned {len(values)} numbers for {len(answers)} completions; expected one for each"
            )
        for value, each in zip(values, answers, strict=True):
            if not math.isfinite(value):
                raise UserError(f"--reward {self.name} returned {value} for {each.place}: {each.response[:80]!r}")
        return np.array(values, np.float64)

    def _call(self, answers: Sequence[Answered]) -> Any:
        """Call the function in a thread, so that one that hangs can be left behind."""
        arguments, result = self._arguments(answers), list[Any]()
        failed = list[BaseException]()

        def work() -> None:
            try:
                result.append(self._function(**arguments))
            except BaseException as error:  # raised again below, in the caller's thread
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(min(self._timeout, threading.TIMEOUT_MAX))
        if thread.is_alive():
            raise UserError(
                f"--reward {self.name} took longer than {self._timeout:g} s for {len(answers)} completions; make it faster, "
                "or give more time with --reward-timeout"
            )
        if failed:
            raise failed[0]
        return result[0]

    def _arguments(self, answers: Sequence[Answered]) -> dict[str, Any]:
        names = dict.fromkeys(name for each in answers for name in each.columns)
        if taken := {"prompts", "completions", "completion_ids"} & names.keys():
            raise UserError(
                f"--reward {self.name}: the data has a column {min(taken)!r}, which the function gets from the model; "
                "rename it"
            )
        arguments = {
            "prompts": [each.prompt if each.messages is None else list(each.messages) for each in answers],
            "completions": [
                each.response if each.messages is None else [{"role": "assistant", "content": each.response}]
                for each in answers
            ],
            "completion_ids": [list(each.response_ids) for each in answers],
            **{name: [each.columns.get(name) for each in answers] for name in names},
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
        """Return where the first response is on which the function fails by itself, for a message."""
        for each in answers:
            try:
                self._call([each])
            except Exception:  # the same error, or another one, of the user's function
                return f" ({each.place}: {each.response[:80]!r})"
        return ""


def _float(value: Any) -> float:
    """Return a number as a float; an infinity for an integer that no float holds. Raises TypeError or ValueError."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
