"""Blocks of reasoning in a text, such as ``<think>`` to ``</think>``."""

from __future__ import annotations

import re
from typing import NamedTuple

# Names of a message's field for the reasoning before its content; templates read one of them.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Marks of reasoning inside a message's content. Each opener is followed by its closer.
_PAIRS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought", "<channel|>"),
)
_OPENERS = {opener for opener, _ in _PAIRS}
_MARKS = re.compile("|".join(re.escape(mark) for pair in _PAIRS for mark in pair))
# Tokens that spell these marks: they open and end blocks, not turns.
MARKS = {mark for pair in _PAIRS for mark in pair} | {"<|channel>"}
# What a generation prompt may end in: <name>, [NAME], <|name>label or another of the marks above.
_OPEN = re.compile(r"(?:<(?P<tag>\w[\w:-]*)>|\[(?P<word>[A-Z_]+)\]|<\|(?P<bar>\w+)>\w*|◁(?P<kimi>\w+)▷)\s*\Z")
_TAG = re.compile(r"<[^<>\n]{1,60}>|\[[^\[\]\n]{1,60}\]|◁[^◁▷\n]{1,60}▷")
_LONGEST_TAG = 62


class ReasoningBlock(NamedTuple):
    """The marks that open and close a block."""

    opener: str
    closer: str


class ContentPart(NamedTuple):
    """A part of a message's content between two marks, and whether it is reasoning."""

    text: str
    reasoning: bool


def opened(text: str) -> ReasoningBlock | None:
    """Return the block that a text opens at its very end, up to white space, or None."""
    found = _OPEN.search(text, max(0, len(text) - 200))
    if found is None:
        return None
    opener = found[0].rstrip()
    for shape, name in found.groupdict().items():
        if name is not None:
            closers = {"tag": f"</{name}>", "word": f"[/{name}]", "bar": f"<{name}|>", "kimi": f"◁/{name}▷"}
            return ReasoningBlock(opener, closers[shape])
    return None


def enclosed(text: str) -> ReasoningBlock | None:
    """Return the block that a text begins with, up to white space, and closes; or None."""
    begun = text.lstrip()
    return next((ReasoningBlock(*pair) for pair in _PAIRS if begun.startswith(pair[0]) and pair[1] in begun), None)


def pieces(content: str) -> list[ContentPart]:
    """Split a message's content at the marks of reasoning; the last piece is what is said in the end.

    Text before a closer without an opener is reasoning too: the generation prompt may have opened the block.
    """
    marks = list(_MARKS.finditer(content))
    if not marks:
        return [ContentPart(content, False)]
    starts, ends = [0, *(mark.end() for mark in marks)], [*(mark.start() for mark in marks), len(content)]
    before = ["", *(mark[0] for mark in marks)]
    found = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        inside = before[number] in _OPENERS or (number == 0 and marks[0][0] not in _OPENERS)
        found.append(ContentPart(content[start:end], inside and number < len(marks)))
    return found


def tag_start(text: str, at: int) -> int:
    """Return `at`, or the start of the tag that it would cut in two."""
    first = max(0, at - _LONGEST_TAG)
    for found in _TAG.finditer(text, first, at + _LONGEST_TAG):
        if found.start() < at < found.end():
            return found.start()
    return at
