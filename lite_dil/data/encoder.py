"""From text to token ids: where the prompt ends, where the answer ends, and what is cut when a pair is too long."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from lite_dil.base.errors import UserError, first_line
from lite_dil.base.hashing import sha256
from lite_dil.data.reader import Answer, Message, Row, RowError

# Templates that print today's date would give other tokens tomorrow, to a run that is resumed. This is Llama 3's own fallback.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


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
        added = tokenizer.added_tokens_decoder.values()
        self.control = {token.content for token in added if token.special} | {tokenizer.eos_token}

    def _ids(self, text: str) -> tuple[int, ...]:
        """Tokenise `text`, adding nothing."""
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, row: Row) -> Example:
        """Tokenise one row. Raises RowError with the reason where the row or the template does not allow it."""
        if isinstance(row.prompt, str):
            prompt = row.prompt
            texts = [self._text_response(text) for text in row.answers if isinstance(text, str)]
        else:
            prompt = self.chat_prompt(row.prompt, row.tools)
            texts = [self._chat_response(row.prompt, prompt, answer, row.tools) for answer in row.answers]
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

    def chat_prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """Lay out messages as the model's chat template does, up to where the assistant is to speak."""
        for message in messages:
            self._refuse_control(message)
        return self._render(messages, tools, add_generation_prompt=True)

    def end_ids(self) -> list[int]:
        """Return the tokens that end an answer: EOS, and what the chat template ends one with, where it differs.

        A model may have learned both. Raises UserError where the template lays out no question and answer.
        """
        ends = {int(self.tokenizer.eos_token_id)}
        if self.tokenizer.chat_template:
            answer = "Yes."
            turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
            try:
                # Not by `_chat_response`: a model whose template begins its answers, with <think> say, can talk.
                text = self._render(turns, None, add_generation_prompt=False)
            except RowError as error:
                raise UserError(str(error)) from None
            if (at := text.rfind(answer)) >= 0:
                ends.add(self.ids(self._ended(text, at + len(answer)))[-1])
        return sorted(ends)

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

    def _text_response(self, text: str) -> str:
        """End a plain-text answer with exactly one EOS, which it may bring along."""
        eos = self.tokenizer.eos_token
        content = text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text
        if eos in content:
            raise RowError("control token", f"an answer holds {eos!r} before its end; remove it")
        return content + eos

    def _chat_response(
        self, messages: list[Message], prompt: str, answer: Answer, tools: list[dict[str, Any]] | None = None
    ) -> str:
        message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        self._refuse_control(message)
        whole = self._render([*messages, message], tools, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise RowError("chat template", "the chat template lays the prompt out differently once an answer follows it")
        text = whole[len(prompt) :]
        if message.get("tool_calls"):
            # How a template writes calls is its own affair; what ends a turn is seen in a plain one.
            end = self._chat_response(messages, prompt, "x", tools).removeprefix("x")
            if end not in text:
                raise RowError("chat template", "the chat template does not end an answer of tool calls as it ends others")
            return text[: text.rfind(end) + len(end)]
        stripped = message["content"].strip()
        found = text.find(stripped)
        if found < 0:
            raise RowError("chat template", "the chat template changes the text of the answer")
        return self._ended(text, found + len(stripped))

    def _ended(self, text: str, content_end: int) -> str:
        """Cut `text` after its end-of-turn token, the first control token behind the content; add EOS where there is none."""
        marks = [(text.find(token, content_end), token) for token in self.control]
        found = [(at, -len(token), token) for at, token in marks if at >= 0]
        if found:
            at, _, token = min(found)
            return text[: at + len(token)]
        return text[:content_end] + self.tokenizer.eos_token

    def _render(self, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise RowError(
                "no chat template",
                "the data is chat messages but this model has no chat template; use an instruct model, or give prompts and "
                "answers as plain text",
            )
        try:
            template = self.tokenizer.get_chat_template()  # of several named ones, the default
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=FIXED_DATE + template,
            )
        except (TemplateError, TypeError) as error:  # TypeError: tools of a kind that the template does not expect
            raise RowError("chat template", f"the model's chat template refuses these messages: {first_line(error)}") from None

    def _refuse_control(self, message: Message) -> None:
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in message.values()]
        for token in self.control:
            if any(token in text for text in texts):
                raise RowError(
                    "control token", f"a message holds the control token {token!r}, which would end or open a turn; remove it"
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
