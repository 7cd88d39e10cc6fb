"""Text for people: without control characters, on one line, and numbers with their nouns."""

from __future__ import annotations

# What a terminal would act on, the eye would miss or no file may hold: control characters (except tab and line feed),
# direction marks, lone surrogates and noncharacters.
_CONTROL = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_CONTROL += [*range(0xD800, 0xE000), 0xFFFE, 0xFFFF]
_ESCAPED = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROL if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """Return a text for reading, such as a model's response, with control characters and kin escaped, the rest unchanged."""
    return text.translate(_ESCAPED)


def visible(text: str, lines: bool = False) -> str:
    """Return a text for inspection, such as data, with every character that is not printable escaped.

    That covers control characters, zero-width characters and direction marks. With `lines`, a line feed is marked and kept;
    otherwise it is escaped as well.
    """
    if text.isprintable():
        return text
    return "".join("↵\n" if lines and c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return a text for publishing, such as a name, on one line and without characters that are not printable."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def count(number: int, noun: str) -> str:
    """Return a number with its noun, plural unless the number is 1."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
