"""Retry in smaller pieces when memory runs out: the same work, with the same result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from lite_dil.base.errors import OutOfMemory

_T = TypeVar("_T")
_R = TypeVar("_R")


class Halving(Generic[_T]):
    """Halves any piece that memory does not hold, and from then on every piece of that size or more.

    Args:
        name: what a piece of this work is called in messages.
        tokens: returns the size of a piece.
        halves: returns the two halves of a piece, or nothing if it cannot be split.
        say: shows a line to the user.
    """

    def __init__(
        self, name: str, tokens: Callable[[_T], int], halves: Callable[[_T], Sequence[_T]], say: Callable[[str], None]
    ) -> None:
        self.name, self.tokens, self.halves, self.say = name, tokens, halves, say
        self.too_large = math.inf

    def run(self, work: Callable[[_T], _R], piece: _T) -> list[_R]:
        """Return the results of `work` for `piece`, or for its parts in order.

        Raises OutOfMemory if a part that cannot be split does not fit.
        """
        size = self.tokens(piece)
        parts = self.halves(piece) if size >= self.too_large else ()
        if not parts:
            try:
                return [work(piece)]
            except OutOfMemory:
                parts = self.halves(piece)
                if not parts:
                    raise
            self.too_large = size
            self.say(f"out of memory in {self.name} of {size} tokens: halved from here on; the result is the same")
        return [result for part in parts for result in self.run(work, part)]


def halves(pieces: Sequence[_T]) -> list[Sequence[_T]]:
    """Return the two halves of a sequence, or nothing if it has one element."""
    middle = (len(pieces) + 1) // 2
    return [pieces[:middle], pieces[middle:]] if middle < len(pieces) else []
