"""Token ids as the pieces of text that they stand for, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_HALF = "\ufffd"  # what stands for bytes that are no whole character
_CONTEXT = 4  # tokens before a piece that decide how it is written (SentencePiece drops a space at the start of a text)


class Piece(NamedTuple):
    """The text of one token, or of the few that split one character; `special` where it is a control token."""

    text: str
    tokens: int
    special: bool


def pieces(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[Piece]:
    """Return the pieces of `ids`, which follow `before`; joined, their texts are what `ids` adds to the text before it."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.add(tokenizer.eos_token_id)

    def text(some: Sequence[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    every, found = [*before, *ids], []
    start = at = len(before)
    while at < len(every):
        at += 1
        context = every[max(0, start - _CONTEXT) : start]
        known = text(context)
        # A character's last byte, or the end of the ids, ends the group; a broken character may be what the text really has.
        if text([*context, *every[start:at]]).endswith(_HALF) and at < len(every) and every[at] not in special:
            continue
        found.append(Piece(text([*context, *every[start:at]])[len(known) :], at - start, every[at - 1] in special))
        start = at
    return found
