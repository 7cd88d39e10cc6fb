"""Decode a model's text token by token, without broken characters or wrong spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 8  # preceding tokens, on which the space before the first token may depend


class TextStream:
    """Decodes the continuation of `prompt` token by token, without special tokens.

    A token's text is what it adds to the text of the few tokens before it, because some tokenizers (SentencePiece) drop the
    space in front of a text, and some tokens are part of a character. The tokenizers library's DecodeStream does this too, but
    raises on invalid bytes, which a model may produce.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt[-CONTEXT:])
        self.start, self.read = 0, len(self.ids)  # the tokens looked back at, and those whose text is out

    def add(self, token: int) -> str:
        """Return the text that is now certain, perhaps empty."""
        self.ids.append(token)
        before, now = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        if now.endswith("\ufffd") or len(now) <= len(before):  # the first bytes of a character, or a special token
            return ""
        self.start, self.read = self.read, len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
