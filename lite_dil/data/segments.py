"""Tokenise many texts at once, each piece between two special tokens only once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

_TRIED = 32  # texts that are also tokenised whole


class Segments:
    """Tokenises texts in batches, without adding special tokens.

    A fast tokenizer first cuts a text at its special tokens, and tokenises what is between them piece by piece. So the ids of
    a text are those of its segments, each from one special token up to the next, and a segment that many texts share, as a
    system message or the prompt of both responses, is tokenised once. This holds for special tokens that are found in the
    text as it is (`normalized`, `lstrip`, `rstrip` and `single_word` are off), and that no other added token covers or runs
    into; a text is cut at no others.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        printed: text with the special tokens that may be common, such as the chat template.
    """

    def __init__(self, tokenizer: Any, printed: str) -> None:
        self.tokenizer = tokenizer
        added = list(tokenizer.added_tokens_decoder.values())
        texts = [token.content for token in added]
        known = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
        # The first segment ends before the first such token.
        marks = [
            token.content
            for token in added
            if token.special
            and not (token.normalized or token.lstrip or token.rstrip or token.single_word or tokenizer.split_special_tokens)
            and (token.content in known or token.content in printed)
            and not any(_covers(other, token.content) for other in texts if other != token.content)
        ]
        self._marks = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True)))) if marks else None
        self._tried = 0

    def cut(self, text: str) -> list[str]:
        """Return the segments of a text; all but the first begin with a special token. An empty text is one segment."""
        if self._marks is None:
            return [text]
        starts = [0, *(found.start() for found in self._marks.finditer(text))]
        return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True) if a < b] or [text]

    def ids(self, texts: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
        """Return the ids of texts, given as their segments."""
        known = self._tokenised(segment for text in texts for segment in text)
        found = [tuple(itertools.chain.from_iterable(map(known.__getitem__, text))) for text in texts]
        if self._marks is not None and self._tried < _TRIED:
            some = ["".join(text) for text in texts[: _TRIED - self._tried]]
            self._tried += len(some)
            whole = self._tokenised(some)
            if [whole[text] for text in some] != found[: len(some)]:  # a tokenizer that does not work as described above
                self._marks = None
                return self.ids([["".join(text)] for text in texts])
        return found

    def _tokenised(self, texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        found = self.tokenizer(
            unique, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        ).input_ids
        return dict(zip(unique, map(tuple, found), strict=True))


def _covers(other: str, mark: str) -> bool:
    """Return whether an added token contains `mark`, or ends in what `mark` begins with, and so may take its place."""
    return mark in other or any(other.endswith(mark[:length]) for length in range(1, len(mark)))
