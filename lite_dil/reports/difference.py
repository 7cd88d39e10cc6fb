"""What changed between two answers, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

# A word, or a character of a script that puts no space between words, or a sign; with the space around it.
_SPACELESS = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"\s*(?:[{_SPACELESS}]|[^\W{_SPACELESS}]+|[^\w\s])\s*")
_COMMON = 0.5  # share of the words of the answer with fewer that the other has too, below which no word is marked
_MOST = 4_000_000  # pairs of words to compare; more take seconds


class Marked(NamedTuple):
    """Part of an answer; `changed` says that the other answer lacks it."""

    text: str
    changed: bool = False


def difference(before: str, after: str) -> tuple[list[Marked], list[Marked]]:
    """Return both answers in pieces; nothing is marked in answers that have little in common, or are very long.

    White space alone is no change.
    """
    words = [_WORD.findall(text) for text in (before, after)]
    bare = [[word.strip() for word in some] for some in words]
    unmarked = [Marked(before)] if before else [], [Marked(after)] if after else []
    if len(bare[0]) * len(bare[1]) > _MOST:
        return unmarked
    blocks = SequenceMatcher(None, bare[0], bare[1], autojunk=False).get_matching_blocks()
    few = min(sum(map(_is_word, some)) for some in bare)
    if not few or sum(_is_word(word) for b in blocks for word in bare[0][b.a : b.a + b.size]) < _COMMON * few:
        return unmarked
    return _pieces(words[0], [(b.a, b.size) for b in blocks]), _pieces(words[1], [(b.b, b.size) for b in blocks])


def _is_word(text: str) -> bool:
    return text[0].isalnum()


def _pieces(words: Sequence[str], same: Sequence[tuple[int, int]]) -> list[Marked]:
    """Return the words in pieces; `same` are the starts and lengths of what the other text has too, with one at the end."""
    found, at = [], 0
    for start, size in same:
        found += [Marked("".join(words[at:start]), True), Marked("".join(words[start : start + size]))]
        at = start + size
    return [piece for piece in found if piece.text]
