"""Errors that the user can fix: one clear message, exit code 2, no traceback."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from lite_dil.base.redaction import redacted


class UserError(Exception):
    """What is wrong, where, what was expected and how to fix it, for the person who typed the command; without secrets."""

    def __init__(self, text: str = "") -> None:
        super().__init__(redacted(text))


class OutOfMemory(UserError):
    """The device's memory did not hold a piece of work; everything is as it was before.

    Args:
        work: what was being done, for people.
        detail: the library's own message.
        helps: options that need less of that memory.
        micro_batch: the number, from 0, of the step's micro-batch that did not fit, or None if it was in none of them.
    """

    HELPS = ("--4bit", "--head-bits 4", "a shorter --max-length")

    def __init__(self, work: str, detail: str, helps: Sequence[str] = HELPS, micro_batch: int | None = None) -> None:
        self.micro_batch = micro_batch
        super().__init__(f"out of memory in {work} ({detail}). What helps: {', '.join(helps)}")


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no longer finite; nothing was saved after the last good checkpoint. Exit code 1."""


def nearest(word: str, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the allowed name nearest to `word`, or an empty string if none is within `cutoff` (0 to 1)."""
    return next(iter(get_close_matches(word, list(allowed), n=1, cutoff=cutoff)), "")


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the allowed name nearest to `word`, or an empty string."""
    near = nearest(word, allowed)
    return f" (did you mean {near!r}?)" if near else ""


def gather(problems: list[str], heading: str, shown: int = 10) -> str:
    """Join problems into one message: the heading, the first `shown` of them, and how many more there are."""
    lines = [heading, *(f"  - {problem}" for problem in problems[:shown])]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not empty, without secrets, or the name of its type."""
    return redacted(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))
