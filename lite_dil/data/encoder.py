"""From text to token ids: where the prompt ends, where the answer ends, and what is cut when a pair is too long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.hashing import sha256
from lite_dil.data.files import RowError
from lite_dil.data.messages import Message
from lite_dil.data.reader import Row
from lite_dil.data.rendering import Rendering


@dataclass(frozen=True)
class Example:
    """A tokenised prompt and the answers to it.

    `responses` are token ids that continue `prompt`, each ending in its end-of-turn token unless it was cut; `signs` holds
    ``CHOSEN`` or ``REJECTED`` for each. `place` is where it came from, for messages.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    signs: tuple[int, ...]
    place: str = field(default="", compare=False)


class Encoder:
    """Turns rows into examples with one tokenizer (a Hugging Face fast tokenizer).

    The prompt is tokenised once, so it is the same tokens for both answers and the tokens that a chat will see. An answer is
    tokenised as the prompt's continuation: apart, SentencePiece would put a space in front of its first word.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no end-of-sequence token, so the model could never learn where answers end")
        # A prompt is tokenised by itself and before each of its answers.
        self.ids = lru_cache(16)(self._ids)
        with_special = tuple(tokenizer("a").input_ids)
        plain = self.ids("a")
        # What the tokenizer itself puts in front of a text: its BOS token, where the model wants one.
        at = next((i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain), 0)
        self.bos = with_special[:at]
        self.rendering = Rendering(tokenizer)

    def _ids(self, text: str) -> tuple[int, ...]:
        """Tokenise `text`, adding nothing."""
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, row: Row) -> Example:
        """Tokenise one row. Raises RowError with the reason where the row or the template does not allow it."""
        prompt = self.rendering.prompt(row.prompt, row.tools)
        texts = [self.rendering.answer(row.prompt, prompt, answer, row.tools) for answer in row.answers]
        prompt_ids = self.prompt_ids(prompt, chat=row.chat)
        if not prompt_ids:
            raise RowError("empty prompt", "the prompt has no token, so nothing predicts the first token of the answers")
        responses = tuple(self.continuation(prompt, text) for text in texts)
        if row.form == "pairs" and responses[0] == responses[1]:
            raise RowError("identical answers", "'chosen' and 'rejected' are the same tokens; there is no preference to learn")
        return Example(prompt_ids, responses, row.signs, row.place)

    def prompt_ids(self, prompt: str, chat: bool) -> tuple[int, ...]:
        """Tokenise a laid-out prompt, with exactly one BOS where the model wants one (a chat template prints its own)."""
        ids = self.ids(prompt)
        if not chat and self.bos and ids[: len(self.bos)] != self.bos:
            return self.bos + ids
        return ids

    def prompt(self, prompt: str | list[Message], tools: list[dict[str, Any]] | None = None) -> tuple[int, ...]:
        """Tokenise what an answer to text, or to chat messages, continues."""
        return self.prompt_ids(self.rendering.prompt(prompt, tools), chat=not isinstance(prompt, str))

    def end_ids(self) -> list[int]:
        """Return the tokens that end an answer; see `Rendering.ends`. Raises UserError where the template tells none."""
        try:
            return sorted({self.ids(end)[-1] for end in self.rendering.ends()})
        except RowError as error:
            raise UserError(str(error)) from None

    def continuation(self, prompt: str, text: str) -> tuple[int, ...]:
        """Tokenise `text` as what follows `prompt`, no token holding characters of both."""
        # Where the last prompt token would merge with the answer, anchors that do not merge stand in for the prompt.
        for anchor in (prompt, "\n", ":", "a", "."):
            start, whole = self.ids(anchor), self.ids(anchor + text)
            if whole[: len(start)] == start and len(whole) > len(start):
                return whole[len(start) :]
        raise RowError(
            "merged tokens", f"the tokenizer merges the start of the answer {text[:20]!r} with whatever precedes it"
        )


def continuation_text(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], plain: bool = False) -> str:
    """Return the text of an answer as its prompt's continuation: by itself, SentencePiece would drop its first space.

    With `plain`, control tokens are left out.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=plain, clean_up_tokenization_spaces=False))

    start, whole = decode(prompt), decode([*prompt, *ids])
    return whole[len(start) :] if whole.startswith(start) else decode(ids)


def truncate(example: Example, max_length: int) -> tuple[Example, bool, bool]:
    """Fit an example into `max_length` tokens; return it, and whether its prompt and any of its responses were cut.

    The prompt is cut first: its first token (BOS) stays, then its last tokens that leave room for the longer answer, the
    same prompt for both. Only then are answers cut, at their end, and never to nothing.
    """
    longest = max(map(len, example.responses))
    room = max(1, max_length - longest)
    prompt = example.prompt
    if len(prompt) > room:
        prompt = prompt[:1] + prompt[len(prompt) - room + 1 :]
    limit = max_length - len(prompt)
    responses = tuple(response[:limit] for response in example.responses)
    return replace(example, prompt=prompt, responses=responses), prompt != example.prompt, longest > limit


def fingerprint(examples: Iterable[Example]) -> str:
    """Return a digest of the token ids and their split, so that a resumed run can tell that its data is the same."""
    parts = ((example.prompt, example.responses, example.signs) for example in examples)
    return sha256(repr(part).encode() for part in parts)[:16]
