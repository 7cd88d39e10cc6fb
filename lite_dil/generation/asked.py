"""Tokenise the prompts that a program gives a policy: text or messages, one or a list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.base.signs import CHOSEN
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.files import RowError
from lite_dil.data.messages import Message, read_messages, read_text
from lite_dil.data.prompts import Prompt
from lite_dil.data.reader import Row, check_prompt
from lite_dil.generation.conversation import context_limit

# A prompt: text, which is a user turn if the model has a chat template and is otherwise continued; or chat messages.
Asked: TypeAlias = str | list[Message]
Several: TypeAlias = list[str] | list[list[Message]] | list[Asked]


def is_one(prompts: Asked | Several) -> bool:
    """Return whether this is one prompt (text, or messages, which are mappings) and not a list of prompts."""
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))


def encode_responses(
    encoder: Encoder, prompts: Asked | Several, responses: str | list[str], chat: bool | None = None
) -> list[Example]:
    """Tokenise prompts and responses: one example with all responses to one prompt, or one example per prompt.

    Args:
        chat: whether plain-text prompts are user messages; None if the model has a chat template.

    Raises UserError if the model cannot take a prompt, or the lists differ in length.
    """
    texts, rows = [responses] if isinstance(responses, str) else list(responses), list[tuple[Any, list[str]]]()
    if is_one(prompts):
        rows = [(prompts, texts)] if texts else []
    elif len(prompts) != len(texts) or isinstance(responses, str):
        given = "one response" if isinstance(responses, str) else f"{len(texts)} responses"
        raise UserError(f"{len(prompts)} prompts and {given}; expected as many responses as prompts, in a list")
    else:
        rows = [(prompt, [text]) for prompt, text in zip(prompts, texts, strict=True)]
    found = []
    for number, (prompt, several) in enumerate(rows, 1):
        try:
            answers = tuple(read_text(text, "response") for text in several)
            row = Row(_asked(encoder, prompt, chat), answers, (CHOSEN,) * len(several), "", "demonstrations")
            found.append(encoder.encode(row))
        except RowError as error:
            raise UserError(f"prompt {number}: {error}") from None
    return found


def encode_requests(encoder: Encoder, model: str, prompts: Asked | Several, room: int) -> list[Prompt]:
    """Tokenise prompts for responses of at most `room` tokens by `model`, a result of `resolve_model`.

    Raises UserError if the model cannot take a prompt.
    """
    if room < 1:
        raise UserError(f"max_new_tokens is {room}; expected at least 1")
    limit, found = context_limit(model), []
    for number, prompt in enumerate([prompts] if is_one(prompts) else prompts, 1):
        try:
            asked = _asked(encoder, prompt)
            check_prompt(asked)
            ids = encoder.prompt(asked)
        except RowError as error:
            raise UserError(f"prompt {number}: {error}") from None
        if limit is not None and len(ids) >= limit:
            raise UserError(f"prompt {number} has {len(ids)} tokens; the model takes {limit}, including the response")
        found.append(Prompt(asked, f"prompt {number}", ids=ids))
    return found


def _asked(encoder: Encoder, prompt: Any, chat: bool | None = None) -> str | list[Message]:
    """Return a prompt for the encoder: text as a user message if `chat`, by default if the model has a chat template.

    Raises RowError.
    """
    if not isinstance(prompt, str):
        return read_messages(prompt, "prompt")
    text = read_text(prompt, "prompt")
    return [{"role": "user", "content": text}] if (encoder.rendering.chats if chat is None else chat) else text


def answer_seed(seed: int, prompt: Prompt, number: int) -> int:
    """Return what decides answer `number` to a prompt."""
    return int(digest(seed, prompt.key, number)[:16], 16)
