"""Anybody's text where people read it: nothing that a terminal would obey, numbers with their nouns, one line of many."""

from __future__ import annotations

# What a terminal would obey or the eye would not see: control characters but tab and line feed, and changes of direction.
_CONTROL = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPED = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROL if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """Return a text to be read, as an answer of a model, with its control characters as codes; all else stays as it is."""
    return text.translate(_ESCAPED)


def visible(text: str, lines: bool = False) -> str:
    """Return a text to be looked at, as data is, with every character that is not printable as its code.

    Those are control characters, and characters that take no room or turn the direction of writing. With `lines`, a line feed
    ends a line, after a mark; otherwise it is written out as well.
    """
    if text.isprintable():
        return text
    return "".join("↵\n" if lines and c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return a text to be published, as a name is, on one line and without the characters that are not printable."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
