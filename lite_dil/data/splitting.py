"""Where the prompt ends in two whole conversations or texts, and Anthropic's transcripts."""

from __future__ import annotations

import re
from typing import Any

from lite_dil.data.columns import about_of, question_of
from lite_dil.data.draft import PAIR, Draft, Raw
from lite_dil.data.files import RowError
from lite_dil.data.messages import Message, read_answer, read_text, read_tools

HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_MARK = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Return whether a text begins with 'Human:', as raw HH rows do."""
    return f"\n\n{text.lstrip()}".startswith(HUMAN)


def split_messages(chosen: list[Message], rejected: list[Message], tools: list[dict[str, Any]] | None = None) -> Draft:
    """Split two conversations after the last shared message; one message must remain in each."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise RowError("identical responses", "'chosen' and 'rejected' are the same conversation: no preference to learn")
    if not shared:
        raise RowError("no shared prompt", "'chosen' and 'rejected' have no common first message, so there is no prompt")
    if len(chosen) != len(rejected):
        raise RowError(
            "different numbers of turns",
            f"'chosen' has {len(chosen)} messages and 'rejected' {len(rejected)}, of which the first {shared} are the same; "
            "expected conversations that differ only in the last response",
        )
    if shared < len(chosen) - 1:
        raise RowError(
            "more than the last response differs",
            f"'chosen' and 'rejected' differ from message {shared + 1} of {len(chosen)} on; expected only the last to differ",
        )
    answers = (read_answer(chosen[shared:], "chosen"), read_answer(rejected[shared:], "rejected"))
    return Draft(chosen[:shared], answers, PAIR, tools)


def split_text(chosen: str, rejected: str, row: Raw) -> Draft:
    """Split two plain texts at their last shared assistant mark, or before the first word that differs.

    Raises RowError, also where the rest of the row says that the start which both share is not the prompt.
    """
    read_text(chosen, "chosen"), read_text(rejected, "rejected")
    notes: tuple[str, ...] = ()
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    mark = chosen.rfind(_ASSISTANT, 0, shared)
    if mark >= 0 and mark + len(_ASSISTANT) <= shared:
        at = mark + len(_ASSISTANT)
    else:
        if _MARK.search(f"\n\n{chosen.lstrip()}"):
            raise RowError("no shared prompt", "'chosen' and 'rejected' are transcripts of different prompts")
        _refuse_guess(row)
        # Never split a word: it belongs to the responses.
        at = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared))
        notes = ("prompts guessed: the shared start of both texts, up to the last whole word",)
    if at <= 0 or not chosen[:at].strip():
        raise RowError("no shared prompt", "there is no 'prompt', and 'chosen' and 'rejected' share no start")
    return Draft(chosen[:at], (chosen[at:], rejected[at:]), PAIR, read_tools(row), notes)


def _refuse_guess(row: Raw) -> None:
    """Raise RowError if a prompt must not be guessed: another column may hold the question, or other rows have a prompt."""
    if column := question_of(row):
        raise RowError(
            "question in another column",
            f"there is no 'prompt', and {column!r} may be the question: --columns prompt={column}; if it is not, remove that "
            "column",
        )
    if about_of(row).prompted:
        raise RowError("no field 'prompt'", "no field 'prompt', or it is null; other rows have one")


def transcript(value: Any, field: str) -> list[Message]:
    """Return the messages of a transcript of Human: and Assistant:. Raises RowError."""
    text = f"\n\n{read_text(value, field).lstrip()}"
    first, *parts = _MARK.split(text)
    if first.strip() or not parts:
        raise RowError(
            "no transcript", f"field {field!r} does not begin with 'Human:'; expected a transcript of Human: and Assistant:"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def transcript_prompt(text: str) -> list[Message] | None:
    """Read a prompt that is an HH transcript ending at the assistant's turn."""
    if not is_transcript(text) or not text.rstrip().endswith(_ASSISTANT):
        return None
    return transcript(text, "prompt")[:-1]
