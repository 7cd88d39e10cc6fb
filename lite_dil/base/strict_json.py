"""JSON as its standard has it: no key twice, and nesting that every reader of the result can follow."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

_DEEPEST = 100  # levels in each other


class JSONError(ValueError):
    """A text is no JSON that can be used; says why."""


class NotFinite(float):
    """NaN or an infinity, which Python writes and reads though JSON has none."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise JSONError(f"the key {double[:100]!r} is given twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=NotFinite)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; NaN, Infinity and -Infinity are `NotFinite`.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: it is not JSON in UTF-8.
        JSONError: an object has a key twice, values are nested too deeply, or a number has thousands of digits.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = _DECODER.decode(text)
    except RecursionError:
        raise JSONError(f"more than {_DEEPEST} levels of lists and objects") from None
    except (json.JSONDecodeError, UnicodeDecodeError, JSONError):
        raise
    except ValueError as error:
        raise JSONError(str(error).partition(";")[0]) from None
    if text.count("[") + text.count("{") > _DEEPEST and _deep(value):
        raise JSONError(f"more than {_DEEPEST} levels of lists and objects")
    return value


def has_constant(value: Any) -> bool:
    """Return whether a value from `parse_json` holds NaN or an infinity."""
    if isinstance(value, (list, dict)):
        return any(map(has_constant, value.values() if isinstance(value, dict) else value))
    return isinstance(value, NotFinite)


def _deep(value: Any) -> bool:
    """Return whether lists and objects are nested more than `_DEEPEST` levels."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for holder in level
            if isinstance(holder, (list, dict))
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return any(isinstance(item, (list, dict)) for item in level)
