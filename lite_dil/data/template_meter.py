"""Count what a chat template makes while it is rendered, and stop one that makes too much or takes too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

TEMPLATE_SECONDS = 5.0  # for one conversation; an ordinary one takes a millisecond
# Bytes of one value, and of all; in addition to this many times the conversation's own size:
LARGEST_VALUE, TOTAL = 2**26, 2**30
_TIMES = 20
MOST_BITS = 2**16  # of a whole number


class TemplateCosts(Exception):
    """A chat template takes too long or makes too much; the text says which, and where."""


class Meter(threading.local):
    """What the template that this thread renders may still use."""

    def __init__(self) -> None:
        self.start(())

    def start(self, given: Any) -> None:
        """Start to count for one conversation."""
        self.given, self.left, self.largest = given, TOTAL, LARGEST_VALUE
        self.until, self.cpu = time.monotonic() + TEMPLATE_SECONDS, time.thread_time()

    def add(self, size: int) -> None:
        """Count a value of `size` bytes that is made. Raises TemplateCosts."""
        self.left -= size
        if size > self.largest or self.left < 0 or time.monotonic() > self.until:
            self._check(size)

    def size(self, value: Any) -> int:
        """Return the bytes that a value takes, what it holds several times counted so; or more than allowed."""
        if (size := size_of(value, self.largest)) > self.largest and self.given is not None:
            self._allow_more()
            size = size_of(value, self.largest)
        return size

    def _allow_more(self) -> None:
        """Allow what a long conversation needs."""
        more, self.given = _TIMES * size_of(self.given, 2**62), None
        self.left, self.largest = self.left + more, self.largest + more

    def _check(self, size: int) -> None:
        if self.given is not None:
            self._allow_more()
        if size > self.largest or self.left < 0:
            limit = self.largest if size > self.largest else self.largest - LARGEST_VALUE + TOTAL
            raise TemplateCosts(f"makes more than {limit >> 20:,} MB of text")
        if time.monotonic() > self.until:
            spent = time.thread_time() - self.cpu
            if spent > TEMPLATE_SECONDS / 2:  # not if the process was stopped, or the machine slept
                raise TemplateCosts(f"takes more than {TEMPLATE_SECONDS:g} seconds")
            self.until = time.monotonic() + TEMPLATE_SECONDS


METER = Meter()


def size_of(value: Any, limit: int) -> int:
    """Return the bytes that a value takes as text or in memory, or a number above `limit`."""
    total, todo = 0, [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            total += 64 + (len(item) if item.isascii() else 4 * len(item))
        elif isinstance(item, (list, tuple)):
            total += 64
            todo.extend(item)
        elif isinstance(item, Mapping):
            total += 64
            todo.extend(item)
            todo.extend(item.values())
        elif isinstance(item, int) and item.bit_length() > MOST_BITS:
            raise TemplateCosts(f"makes a number of {item.bit_length():,} bits")
        else:
            total += 64
        if total > limit:
            break
    return total
