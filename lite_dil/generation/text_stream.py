"""Text from a model, token by token: no half characters, no wrong spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 8  # tokens before the first one, by which a tokenizer decides on the space between


class TextStream:
    """The text of what follows `prompt`, token by token, without special tokens.

    A token's text is what it adds to the text of the few before it, because some tokenizers drop the space in front of a text
    (SentencePiece), and some tokens are part of a character. tokenizers' DecodeStream does this too, but ends in an exception
    where bytes make no character, which a model is free to say.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt[-CONTEXT:])
        self.start, self.read = 0, len(self.ids)  # the tokens looked back at, and those whose text is out

    def add(self, token: int) -> str:
        """Return the text that is sure now, which may be none."""
        self.ids.append(token)
        before, now = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        if now.endswith("\ufffd") or len(now) <= len(before):  # the first bytes of a character, or a special token
            return ""
        self.start, self.read = self.read, len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
