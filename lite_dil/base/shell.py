"""Commands as they are typed in a shell."""

from __future__ import annotations

import os
import re
import shlex

_PLAIN = re.compile(r"[\w@%+=:,./\\-]+" if os.name == "nt" else r"[\w@%+=:,./-]+", re.ASCII)


def quote(word: str, always: bool = False) -> str:
    """Return a word with the quotes that it needs, or `always`: double ones, which all shells know, where they are enough."""
    if not always and _PLAIN.fullmatch(word):
        return word
    return f'"{word}"' if os.name == "nt" or not re.search(r'["$`\\!]', word) else shlex.quote(word)


def command(*words: str) -> str:
    """Return a command line."""
    return " ".join(map(quote, words))
