"""Text to token ids: where the prompt and the responses end, and what is cut when a pair is too long."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from lite_dil.base.errors import UserError
from lite_dil.base.hashing import sha256
from lite_dil.data.arguments import parse_arguments
from lite_dil.data.files import RowError
from lite_dil.data.messages import Message
from lite_dil.data.reader import Row
from lite_dil.data.rendering import Rendering
from lite_dil.data.segments import Segments
from lite_dil.models.find import load_tokenizer
from lite_dil.models.options import ModelOptions
from lite_dil.models.table import beyond_table, table_rows

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A tokenised prompt and the responses to it.

    `responses` are token ids that continue `prompt`, each ending in its end-of-turn token unless it was cut; `signs` holds
    ``CHOSEN`` or ``REJECTED`` for each. `place` names the row in messages; `margin` is that of a `lite_dil.data.reader.Row`.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    signs: tuple[int, ...]
    place: str = field(default="", compare=False)
    margin: float = 0.0


class _Rendered(NamedTuple):
    """A row as text: its prompt and responses, and what its owner should know about it."""

    prompt: str
    responses: list[str]
    notes: frozenset[str]


class Encoder:
    """Turns rows into examples with one tokenizer (a Hugging Face fast tokenizer).

    The prompt is tokenised once, so that both responses share its tokens, the same ones that a chat feeds the model. A
    response is tokenised as the prompt's continuation: by itself, SentencePiece would put a space in front of its first word.

    Args:
        arguments: further arguments of the chat template, such as `enable_thinking`.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no end-of-sequence token, so the model cannot learn where responses end")
        self._beyond = beyond_table(tokenizer)
        self.ids = lru_cache(16)(self._ids)
        with_special = tuple(tokenizer("a").input_ids)
        plain = self.ids("a")
        # What the tokenizer puts in front of a text: its BOS token, if the model uses one.
        at = next((i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain), 0)
        self.bos = with_special[:at]
        self.rendering = Rendering(tokenizer, arguments)
        self._segments = Segments(tokenizer, self.rendering.template_text)

    def identity(self) -> dict[str, Any]:
        """Return what the tokens of a row depend on besides the row, as JSON holds it."""
        tokenizer, rendering = self.tokenizer, self.rendering
        return {
            "tokenizer": sha256([tokenizer.backend_tokenizer.to_str().encode()]),
            "special": [
                tokenizer.eos_token,
                repr(sorted(tokenizer.special_tokens_map.items())),
                tokenizer.split_special_tokens,
            ],
            "template": tokenizer.chat_template,
            "arguments": rendering.arguments,
            "beyond": sorted(self._beyond),
        }

    def _ids(self, text: str) -> tuple[int, ...]:
        """Tokenise `text` without adding special tokens."""
        return self._in_table(tuple(self.tokenizer(text, add_special_tokens=False).input_ids))

    def _in_table(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return `ids`. Raises UserError if the model's embedding table lacks one of them."""
        if self._beyond and (found := self._beyond.keys() & set(ids)):
            raise UserError(self._beyond[min(found)])
        return ids

    def encode(self, row: Row, notes: Counter[str] | None = None) -> Example:
        """Tokenise one row. Raises RowError, with the reason, if the row or the template does not allow it.

        Args:
            notes: counts the rows by what their owner should know about them.
        """
        (found,) = self.encode_all([row], notes)
        if isinstance(found, RowError):
            raise found
        return found

    def encode_all(self, rows: Sequence[Row], notes: Counter[str] | None = None) -> list[Example | RowError]:
        """Return for each row what `encode` returns or raises; many rows at once take half the time."""
        rendered = [None if row.ids else self._rendered(row) for row in rows]
        texts = list[list[str]]()  # as segments: of each row the prompt, its last segment, and that with each response
        for text in rendered:
            if isinstance(text, _Rendered):
                *_, last = prompt = self._segments.cut(text.prompt)
                texts += [prompt, [last], *(self._segments.cut(last + response) for response in text.responses)]
        ids = map(self._in_table, self._segments.ids(texts))
        found = list[Example | RowError]()
        for row, text in zip(rows, rendered, strict=True):
            if isinstance(text, _Rendered):
                prompt_ids, *others = itertools.islice(ids, 2 + len(text.responses))
                found.append(self._example(row, text, prompt_ids, others))
                if notes is not None and isinstance(found[-1], Example):
                    notes.update(text.notes)
            else:
                found.append(text or self._as_given(row, notes))
        return found

    @cached_property
    def vocabulary(self) -> int:
        """The number of token ids; the model's table may have rows that the tokenizer has no text for, and may draw them."""
        return table_rows(self.tokenizer) or max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def _ends(self) -> frozenset[int]:
        return frozenset(self.end_ids())

    def _as_given(self, row: Row, notes: Counter[str] | None) -> Example | RowError:
        """Return a row of token ids: nothing is put in front of them, or at their end."""
        fields = ("prompt_ids", "chosen_ids", "rejected_ids") if row.form == "pairs" else ("prompt_ids", "completion_ids")
        for name, ids in zip(fields, row.ids, strict=True):
            if max(ids) >= self.vocabulary:
                return RowError(
                    "token ids",
                    f"field {name!r} has the token {max(ids)}, which the model lacks; expected ids from 0 to "
                    f"{self.vocabulary - 1}",
                )
        prompt, *responses = row.ids
        if notes is not None and any(response[-1] not in self._ends for response in responses):
            notes["token ids of a response without an end token at its end: the model does not learn to end there"] += 1
        return Example(prompt, tuple(responses), row.signs, row.place, row.margin)

    def spelled(self, row: Row) -> Row:
        """Return a row with texts for people: those of its token ids, if it has some."""
        if not row.ids:
            return row
        prompt, *responses = row.ids
        answers = tuple(continuation_text(self.tokenizer, prompt, response) for response in responses)
        return replace(row, prompt=continuation_text(self.tokenizer, (), prompt), answers=answers)

    def _example(self, row: Row, text: _Rendered, ids: tuple[int, ...], others: list[tuple[int, ...]]) -> Example | RowError:
        """Return a row's tokens; `ids` are its prompt's, `others` those of its last segment, alone and with each response."""
        prompt = self._with_bos(ids, row.chat)
        if not prompt:
            return RowError("empty prompt", "the prompt has no token, so nothing predicts the first token of the responses")
        last, *continued = others
        try:
            responses = tuple(
                whole[len(last) :]
                if whole[: len(last)] == last and len(whole) > len(last)
                else self.continuation(text.prompt, response)
                for whole, response in zip(continued, text.responses, strict=True)
            )
        except RowError as error:
            return error
        if row.form == "pairs" and responses[0] == responses[1]:
            return RowError(
                "identical responses", "'chosen' and 'rejected' are the same tokens; there is no preference to learn"
            )
        return Example(prompt, responses, row.signs, row.place, row.margin)

    def _rendered(self, row: Row) -> _Rendered | RowError:
        self.rendering.notes.clear()
        try:
            prompt = self.rendering.prompt(row.prompt, row.tools, row.arguments)
            texts = [self.rendering.answer(row.prompt, prompt, answer, row.tools, row.arguments) for answer in row.answers]
        except RowError as error:
            return error
        return _Rendered(prompt, texts, frozenset(self.rendering.notes))

    def prompt_ids(self, prompt: str, chat: bool) -> tuple[int, ...]:
        """Tokenise a rendered prompt, with exactly one BOS if the model uses one (a chat template prints its own)."""
        return self._with_bos(self.ids(prompt), chat)

    def _with_bos(self, ids: tuple[int, ...], chat: bool) -> tuple[int, ...]:
        if not chat and self.bos and ids[: len(self.bos)] != self.bos:
            return self._in_table(self.bos) + ids
        return ids

    def prompt(
        self,
        prompt: str | list[Message],
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Tokenise a prompt, text or chat messages, up to where a response begins."""
        return self.prompt_ids(self.rendering.prompt(prompt, tools, arguments), chat=not isinstance(prompt, str))

    def message(self, prompt: Sequence[int], ids: Sequence[int]) -> Message:
        """Return a generated response to a chat as the assistant's message, without control tokens.

        Args:
            ids: its tokens without the one that ended it.
        """
        spelled = self.rendering.read(continuation_text(self.tokenizer, prompt, ids))
        text = spelled["content"] if spelled else continuation_text(self.tokenizer, prompt, ids, plain=True)
        return {"role": "assistant", **(spelled or {}), "content": text.strip()}

    def end_ids(self) -> list[int]:
        """Return the tokens that end a response; see `Rendering.ends`. Raises UserError if the template has none."""
        try:
            return sorted({self.ids(end)[-1] for end in self.rendering.ends()})
        except RowError as error:
            raise UserError(str(error)) from None

    def continuation(self, prompt: str, text: str) -> tuple[int, ...]:
        """Tokenise `text` as the continuation of `prompt`; no token has characters of both."""
        # If the last prompt token would merge with the response, an anchor that does not merge replaces the prompt.
        for anchor in (prompt, "\n", ":", "a", "."):
            start, whole = self.ids(anchor), self.ids(anchor + text)
            if whole[: len(start)] == start and len(whole) > len(start):
                return whole[len(start) :]
        raise RowError(
            "merged tokens", f"the tokenizer merges the start of the response {text[:20]!r} with whatever precedes it"
        )


def continuation_text(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], plain: bool = False) -> str:
    """Return a response's text as the continuation of its prompt: by itself, SentencePiece would drop its first space.

    With `plain`, control tokens are left out.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=plain, clean_up_tokenization_spaces=False))

    start, whole = decode(prompt), decode([*prompt, *ids])
    return whole[len(start) :] if whole.startswith(start) else decode(ids)


def truncate(example: Example, max_length: int) -> tuple[Example, bool, bool]:
    """Cut an example to `max_length` tokens; return it, whether its prompt was cut, and whether a response was.

    The prompt is cut first: it keeps its first token (BOS) and as many of its last tokens as leave room for the longer
    response, the same prompt for both. Only then are responses cut, at their end, never to nothing.
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
    """Return a digest of the token ids and their split, by which a resumed run recognises its data."""
    # A margin of 0, which is none, is left out, so that other data keeps its digest.
    parts = ((e.prompt, e.responses, e.signs, *((e.margin,) if e.margin else ())) for e in examples)
    return sha256(repr(part).encode() for part in parts)[:16]


def encoder_of(model: str, options: ModelOptions) -> Encoder:
    """Return the encoder of a model, given by its folder or hub id, with the options' template arguments. Raises UserError."""
    tokenizer = load_tokenizer(model, options.trust_remote_code)
    return Encoder(tokenizer, parse_arguments(options.chat_template_kwargs))
