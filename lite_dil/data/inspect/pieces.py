"""Token ids as pieces of text, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_HALF = "\ufffd"  # replaces bytes that are not a whole character
_CONTEXT = 4  # preceding tokens that may change a piece's text (SentencePiece drops a space at the start of a text)


class Piece(NamedTuple):
    """The text of one token, or of the tokens that make up one character; `special` if it is a control token."""

    text: str
    tokens: int
    special: bool


def pieces(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[Piece]:
    """Return the pieces of `ids`, which follow `before`; their texts joined are what `ids` adds to the text of `before`."""
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
        # A character's last byte, or the end of the ids, ends the group; the text itself may contain a broken character.
        if text([*context, *every[start:at]]).endswith(_HALF) and at < len(every) and every[at] not in special:
            continue
        found.append(Piece(text([*context, *every[start:at]])[len(known) :], at - start, every[at - 1] in special))
        start = at
    return found
