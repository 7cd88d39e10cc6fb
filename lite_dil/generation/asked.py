"""What a program asks a policy: texts and messages, one or a list, as tokens."""

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

# A text, which is one user turn where the model has a chat template and else continued as it stands; or chat messages.
Asked: TypeAlias = str | list[Message]
Several: TypeAlias = list[str] | list[list[Message]] | list[Asked]


def is_one(prompts: Asked | Several) -> bool:
    """Return whether this is a prompt, and not a list of them: text, or messages, which are mappings."""
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))


def scored(encoder: Encoder, prompts: Asked | Several, responses: str | list[str]) -> list[Example]:
    """Tokenise prompts and responses: one example with all responses to one prompt, or an example a prompt.

    Raises UserError where the model cannot be asked that, or the lists differ in length.
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
            row = Row(_asked(encoder, prompt), answers, (CHOSEN,) * len(several), "", "demonstrations")
            found.append(encoder.encode(row))
        except RowError as error:
            raise UserError(f"prompt {number}: {error}") from None
    return found


def answered(encoder: Encoder, model: str, prompts: Asked | Several, room: int) -> list[Prompt]:
    """Tokenise prompts that are to be answered with at most `room` tokens by `model`, as `resolve_model` returned it.

    Raises UserError where the model cannot be asked that.
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
            raise UserError(f"prompt {number} has {len(ids)} tokens; the model takes {limit}, the answer's among them")
        found.append(Prompt(asked, f"prompt {number}", ids=ids))
    return found


def _asked(encoder: Encoder, prompt: Any) -> str | list[Message]:
    """Return a prompt as the encoder takes it: messages where the model chats. Raises RowError."""
    if not isinstance(prompt, str):
        return read_messages(prompt, "prompt")
    text = read_text(prompt, "prompt")
    return [{"role": "user", "content": text}] if encoder.rendering.chats else text


def answer_seed(seed: int, prompt: Prompt, number: int) -> int:
    """Return what decides answer `number` to a prompt."""
    return int(digest(seed, prompt.key, number)[:16], 16)
