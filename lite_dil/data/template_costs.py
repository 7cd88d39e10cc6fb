"""What a chat template costs: its values counted while it runs, and refused before they would be huge."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import wraps
from string import Formatter
from typing import Any

from jinja2 import TemplateError

MOST_SECONDS = 5.0  # for one conversation; an ordinary one takes a millisecond
LARGEST_VALUE, ALL_VALUES = 2**26, 2**30  # bytes of one value, and of all
_TIMES = 20  # in addition, so many times the conversation's own size
MOST_BITS = 2**16  # of a whole number
_WIDTH = 1000  # of white space around a text, and of padding
_SHORT = 1000  # characters of a text

# Methods and filters that `_check` looks at.
GROWING = {
    *("ljust", "rjust", "center", "zfill", "indent", "batch", "slice", "round", "replace", "strip", "lstrip"),
    *(
        "rstrip",
        "trim",
        "rsplit",
        "rfind",
        "rindex",
        "rpartition",
        "%",
        "format",
        "format_map",
        "join",
    ),
}


class TemplateCosts(Exception):
    """A chat template takes too long or makes too much; the text says which, and where."""


class Meter(threading.local):
    """What the template that this thread renders may still use."""

    def __init__(self) -> None:
        self.start(())

    def start(self, given: Any) -> None:
        """Start to count for one conversation."""
        self.given, self.left, self.largest = given, ALL_VALUES, LARGEST_VALUE
        self.until, self.cpu = time.monotonic() + MOST_SECONDS, time.thread_time()

    def add(self, size: int) -> None:
        """Count a value of `size` bytes that is made. Raises TemplateCosts."""
        self.left -= size
        if size > self.largest or self.left < 0 or time.monotonic() > self.until:
            self._check(size)

    def size(self, value: Any) -> int:
        """Return the bytes that a value takes, what it holds several times counted so; or more than allowed."""
        if (size := _size(value, self.largest)) > self.largest and self.given is not None:
            self._allow_more()
            size = _size(value, self.largest)
        return size

    def _allow_more(self) -> None:
        """Allow what a long conversation needs."""
        more, self.given = _TIMES * _size(self.given, 2**62), None
        self.left, self.largest = self.left + more, self.largest + more

    def _check(self, size: int) -> None:
        if self.given is not None:
            self._allow_more()
        if size > self.largest or self.left < 0:
            limit = self.largest if size > self.largest else self.largest - LARGEST_VALUE + ALL_VALUES
            raise TemplateCosts(f"makes more than {limit >> 20:,} MB of text")
        if time.monotonic() > self.until:
            spent = time.thread_time() - self.cpu
            if spent > MOST_SECONDS / 2:  # not if the process was stopped, or the machine slept
                raise TemplateCosts(f"takes more than {MOST_SECONDS:g} seconds")
            self.until = time.monotonic() + MOST_SECONDS


METER = Meter()


def _size(value: Any, limit: int) -> int:
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


def made(value: Any) -> Any:
    """Count a value that the template made, and return it. Short texts are counted by what holds or prints them."""
    if type(value) is str:
        if len(value) > _SHORT:
            METER.add(len(value) if value.isascii() else 4 * len(value))
    elif value is not None and type(value) is not bool:
        METER.add(METER.size(value))
    return value


def sliced(value: Any) -> Any:
    """Count a slice, of which nothing is new but the list."""
    METER.add(64 + 8 * len(value) if isinstance(value, Sized) else 64)
    return value


def looped(values: Iterable[Any], printed: int) -> Iterator[Any]:
    """Yield what a loop goes through, counting `printed`, the bytes of text that the template itself has within the loop."""
    for value in values:
        METER.add(printed)
        yield value


def printed(value: Any) -> Any:
    """Count a value before it is printed. One that is not a text was counted when it was made, with all that it holds."""
    METER.add(64 + (len(value) if value.isascii() else 4 * len(value)) if isinstance(value, str) else 64)
    return value


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts its result, and is refused where that would be huge."""
    at = 0 if getattr(function, "jinja_pass_arg", None) is None else 1  # behind the environment, or what it evaluates
    growing = "%" if name == "format" else name if name in GROWING else ""

    @wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Any:
        METER.add(64)
        if growing:
            check(growing, args[at], args[at + 1 :], kwargs)
        if name in ("join", "sum"):
            args = (*args[:at], _pieces(name, args[at], args[at + 1 :], kwargs), *args[at + 1 :])
        try:
            result = function(*args, **kwargs)
        except AssertionError as error:  # how jinja2's truncate refuses its arguments
            raise TemplateError(f"the filter {name}: {error}") from None
        return made(result)

    return bound


def _pieces(name: str, values: Iterable[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what is joined, counted: the same long text may come many times."""
    for value in values:
        if name == "sum" and isinstance(value, (list, tuple)):
            raise TemplateError("the filter sum takes numbers")
        METER.add(METER.size((value, *args, *kwargs.values())))
        yield value


def check(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Refuse a filter, or a text's method, whose result or time would be huge; return the arguments."""
    given = [*args, *kwargs.values()]
    text = value if isinstance(value, str) else ""
    longest = max((len(each) for each in given if isinstance(each, str)), default=0)
    if name in ("ljust", "rjust", "center", "zfill", "indent", "batch", "slice", "round"):
        check_width(max((abs(each) for each in given if isinstance(each, int)), default=0))
    if name == "indent":
        METER.add((text.count("\n") + 2) * longest)
    elif name == "replace":
        METER.add(4 * longest * max((str(value).count(str(each)) for each in given[:2]), default=0))
    elif name in ("strip", "lstrip", "rstrip", "trim", "rsplit", "rfind", "rindex", "rpartition"):
        METER.add(len(text) * longest >> 8)  # in the worst case each character is compared with each
    elif name in ("%", "format", "format_map"):
        check_format(text, percent=name == "%")
    elif name == "join" and args and isinstance(value, str):  # the method; the filter's values are counted one by one
        if not isinstance(args[0], str):
            return (_pieces(name, args[0], [text], {}), *args[1:])
        METER.add(4 * len(args[0]) * len(text))
    return tuple(args)


def check_width(width: int) -> None:
    """Refuse a huge width, or a huge number of pieces."""
    if width > _WIDTH:
        raise TemplateCosts(f"asks for a width or number of {width:,}; expected at most {_WIDTH:,}")


def check_format(text: str, percent: bool) -> None:
    """Refuse a format whose width is huge, or comes from another value."""
    if percent:
        wide = re.search(r"%[^a-zA-Z%]*(?:\d{4}|\*)", text) is not None
    else:
        wide = any(spec and re.search(r"\d{4}|\{", spec) for _, _, spec, _ in Formatter().parse(text))
    if wide:
        raise TemplateCosts(f"asks for a width of more than {_WIDTH:,} in the format {text[:60]!r}")
