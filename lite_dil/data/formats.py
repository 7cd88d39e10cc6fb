"""The formats of preference data, and how to detect the format of a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lite_dil.data import compared
from lite_dil.data import format_readers as readers
from lite_dil.data.arguments import FIELD, read_arguments
from lite_dil.data.columns import refuse_unreadable
from lite_dil.data.draft import Draft, Raw
from lite_dil.data.files import RowError
from lite_dil.data.format_readers import ID_FIELDS, LISTS, QUESTIONS, SCORE_FIELDS, TEXTS, is_pair
from lite_dil.data.messages import Completion, Message, is_message, kind_of, read_messages, read_text, read_tools
from lite_dil.data.splitting import is_transcript, transcript_prompt


@dataclass(frozen=True)
class Format:
    """One format: `fields` are the required fields, for messages; `fits` recognises a row."""

    title: str
    fields: tuple[str, ...]
    fits: Callable[[Raw], bool]
    read: Callable[[Raw], Draft]


def _fits_ids(row: Raw) -> bool:
    return isinstance(row.get(ID_FIELDS[0]), (list, tuple))  # a --sample-file has rejected_ids beside its texts


def _fits_hh(row: Raw) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    return not row.get("prompt") and all(isinstance(side, str) and is_transcript(side) for side in sides)


def _fits_sharegpt(row: Raw) -> bool:
    return _is_list(row.get("conversations"))


def _fits_alpaca(row: Raw) -> bool:
    asked = "instruction" in row and (row["instruction"] != "" or "prompt" not in row)
    return asked and ("output" in row or is_pair(row)) and not any(_is_list(row.get(name)) for name in LISTS)


def _fits_unpaired(row: Raw) -> bool:
    return "prompt" in row and "completion" in row and "label" in row


def _fits_ranked(row: Raw) -> bool:
    return any(name in row for name in QUESTIONS) and any(_is_list(row.get(name)) for name in LISTS)


def _fits_completion(row: Raw) -> bool:
    return "prompt" in row and "completion" in row and "label" not in row


def _fits_messages(row: Raw) -> bool:
    return _is_list(row.get("messages"))


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


FORMATS: dict[str, Format] = {
    "ids": Format("token ids", ID_FIELDS[:3], _fits_ids, readers.of_ids),  # first, so that text beside them is refused
    "hh": Format("raw HH transcripts, 'Human:' and 'Assistant:'", ("chosen", "rejected"), _fits_hh, readers.of_hh),
    "sharegpt": Format("ShareGPT / LLaMA-Factory conversations", ("conversations",), _fits_sharegpt, readers.of_sharegpt),
    "alpaca": Format("Alpaca instructions", ("instruction", "output"), _fits_alpaca, readers.of_alpaca),
    "preference": Format("chosen and rejected", ("prompt", "chosen", "rejected"), is_pair, readers.of_preference),
    "compared": Format(
        "two responses and which one is better",
        ("prompt", "response_0", "response_1", "better_response_id"),
        compared.fits,
        compared.of_compared,
    ),
    "unpaired": Format(
        "single responses with a label", ("prompt", "completion", "label"), _fits_unpaired, readers.of_unpaired
    ),
    "ranked": Format(
        "several responses with scores, best against worst", ("prompt", "responses"), _fits_ranked, readers.of_ranked
    ),
    "completion": Format("prompt and completion", ("prompt", "completion"), _fits_completion, readers.of_completion),
    "messages": Format("conversations, the last turn trained", ("messages",), _fits_messages, readers.of_messages),
}
# Fields that --columns can name.
ROW_FIELDS = sorted(
    {name for spec in FORMATS.values() for name in spec.fields}
    | {
        *LISTS,
        *QUESTIONS,
        *ID_FIELDS,
        *(f"{name}s" for name in (*SCORE_FIELDS, "rank")),
        "input",
        "system",
        "history",
        "tools",
        "kto_tag",
        FIELD,
    }
)
_READ_HISTORY = ("alpaca", "compared")  # formats whose own readers take 'history'
# Columns that may hold a response.
_RESPONSES = ("chosen", "rejected", *LISTS, *TEXTS, "solution", "reply", "target")


def detect(rows: Iterable[Any]) -> str:
    """Return the format of most of these rows, or "preference" if they have none: its errors are the clearest."""
    found = Counter(name for row in rows if isinstance(row, dict) and (name := format_of(row)))
    return found.most_common(1)[0][0] if found else "preference"


def format_of(row: Raw) -> str:
    """Return the format of one row, or an empty string if it has none."""
    return next((name for name, spec in FORMATS.items() if spec.fits(row)), "")


def kind_of_prompts(chat: bool, formats: Iterable[str]) -> str:
    """Return in words what the prompts of a data set are, which was read in these formats."""
    return "token ids" if "ids" in formats else "chat messages" if chat else "plain text"


def prompts_only(row: Raw) -> bool:
    """Return whether a row has a prompt and nothing that may be a response to it."""
    if any(row.get(name) not in (None, "", []) for name in _RESPONSES) or any(name in compared.SIDES_OF for name in row):
        return False
    for name in ("messages", "conversations"):
        if _is_list(row.get(name)):
            return not is_message(row[name][-1], "assistant")
    return any(row.get(name) not in (None, "", []) for name in ("prompt", "instruction", "turns"))


def read(row: Any, name: str, chat: bool = False) -> Draft:
    """Read a row in the format `name`; with `chat`, a plain-text prompt becomes the user's message. Raises RowError."""
    spec = FORMATS[name]
    if not isinstance(row, dict):
        raise RowError(
            "not an object", f"expected a JSON object with the fields {', '.join(spec.fields)}, found {kind_of(row)}"
        )
    refuse_unreadable(row)
    draft = spec.read(row)
    if draft.ids:
        if chat:
            raise RowError("beside token ids", "--chat makes messages of text, and the row has token ids; leave it out")
        return draft
    draft = draft._replace(tools=draft.tools or read_tools(row), arguments=read_arguments(row))
    if chat and isinstance(draft.prompt, str):
        turns = transcript_prompt(draft.prompt) or [{"role": "user", "content": draft.prompt.strip()}]
        draft = draft._replace(prompt=turns, answers=tuple(_stripped(answer) for answer in draft.answers))
    if name not in _READ_HISTORY and _is_list(row.get("history")):
        draft = _with_history(draft, row["history"])
    return _with_system(draft, row["system"]) if row.get("system") else draft


def _stripped(answer: Completion) -> Completion:
    return answer.strip() if isinstance(answer, str) else answer


def _with_history(draft: Draft, turns: list[Any]) -> Draft:
    """Put the column 'history' in front of a prompt, if it holds messages or [question, response] pairs. Raises RowError."""
    if all(map(is_message, turns)):
        messages = read_messages(turns, "history")
    elif all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns):
        messages = readers.of_turns(turns)
    else:
        return draft
    if isinstance(draft.prompt, str):
        raise RowError(
            "history of plain text", "'history' holds earlier turns, and the prompt is plain text; --chat makes it messages"
        )
    return draft._replace(prompt=[*messages, *draft.prompt])


def _with_system(draft: Draft, value: Any) -> Draft:
    """Put the column 'system' in front of a prompt. Raises RowError if the prompt has another system message."""
    system = read_text(value, "system")
    if not system.strip():
        return draft
    if isinstance(draft.prompt, str):
        note = "'system' put in front of a plain-text prompt, with a blank line (--chat makes it a system message)"
        return draft._replace(prompt=f"{system.strip()}\n\n{draft.prompt}", notes=(*draft.notes, note))
    message: Message = {"role": "system", "content": system}
    if draft.prompt[0]["role"] != "system":
        return draft._replace(prompt=[message, *draft.prompt])
    if draft.prompt[0]["content"].strip() != system.strip():
        raise RowError("two system messages", "'system' is another text than the conversation's system message; remove one")
    return draft
