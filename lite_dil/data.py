"""Reading data: every row is checked at the door, and every problem names its file, line, field and fix."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_dil.errors import UserError, did_you_mean, first_line, gather

EMBEDDED = "short-answers"
CHOSEN, REJECTED = 1, -1
# The fields by which each form is known; the form of a file is that of its first row.
FORMS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "demonstrations": ("prompt", "completion"),
}
_ALL_FORMS = "; or ".join(f"{', '.join(fields)} ({form})" for form, fields in FORMS.items())
ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One row: a prompt and the answers to it, each ``CHOSEN`` (good) or ``REJECTED`` (bad) by its sign.

    A pair has one of each, an unpaired row a single answer, a demonstration a single good one. With `chat` the prompt is a
    list of messages, to be laid out by the model's chat template; otherwise it is plain text that the answers continue as it
    stands. `place` is where the row came from, for error messages.
    """

    prompt: str | list[Message]
    answers: tuple[str, ...]
    signs: tuple[int, ...]
    place: str
    form: str

    @classmethod
    def pair(cls, prompt: str | list[Message], chosen: str, rejected: str, place: str) -> Row:
        """Make a row of a pair."""
        return cls(prompt, (chosen, rejected), (CHOSEN, REJECTED), place, "pairs")

    @property
    def chat(self) -> bool:
        """Whether the prompt is chat messages."""
        return not isinstance(self.prompt, str)


class RowError(ValueError):
    """Why one row cannot be trained on."""


def read_rows(source: str, split: str = "train") -> list[Row]:
    """Read and check a whole data set, all of whose rows have one form: pairs, unpaired or demonstrations.

    Args:
        source: a ``.jsonl`` or ``.json`` file, plain or gzipped; ``short-answers``, the set inside this package; or the id
            of a data set on the Hugging Face hub, ``owner/name`` or ``owner/name:split``.
        split: the split to take where `source` names none.

    Raises:
        UserError: naming every bad row (the first ten in full) or what is wrong with the file as a whole.
    """
    if source == EMBEDDED:
        rows = _file_rows(Path(__file__).parent / "short_answers" / f"{split}.jsonl")
    elif Path(source).exists() or Path(source).suffix in {".jsonl", ".json", ".gz"}:
        rows = _file_rows(Path(source))
    else:
        rows = _hub_rows(source, split)

    kept: list[Row] = []
    problems: list[str] = []
    form = ""
    for place, value in rows:
        if isinstance(value, RowError):
            problems.append(f"{place}: {value}")
            continue
        form = form or _form(value)
        try:
            row = _check(value, place, form or "pairs")
        except RowError as error:
            problems.append(f"{place}: {error}")
            continue
        if kept and kept[0].chat != row.chat:
            kinds = ("plain text", "chat messages")
            problems.append(
                f"{place}: the prompt is {kinds[row.chat]}, but {kept[0].place} has {kinds[kept[0].chat]}; "
                "keep one kind in a file"
            )
            continue
        kept.append(row)
    if problems:
        raise UserError(gather(problems, f"{source}: {len(problems)} of {len(kept) + len(problems)} rows cannot be used:"))
    if not kept:
        raise UserError(f"{source}: no rows; expected one JSON object a line with the fields {_ALL_FORMS}")
    return kept


def _form(row: Any) -> str:
    """Return the form whose fields a row has, or nothing where it has those of none."""
    if not isinstance(row, dict):
        return ""
    return next((form for form, fields in FORMS.items() if row.keys() >= set(fields)), "")


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, parsed row or RowError) for each row of a JSON Lines file or a JSON array."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; give one .jsonl, .json or .gz file in it")
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]

    if raw.lstrip()[:1] == b"[":
        try:
            rows = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a valid JSON array ({error})") from None
        for number, row in enumerate(rows, 1):
            yield f"{path} row {number}", row
        return
    # Lines end at \n only: U+2028 and its like are legal inside JSON strings.
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            yield f"{path} line {number}", _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowError(
            f"not valid JSON ({error.msg} at column {error.colno}); expected one whole JSON object a line, or one JSON array"
        )
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, nesting of thousands of levels
        return RowError(f"not usable JSON ({error})")


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    name, _, named_split = source.partition(":")
    if name.count("/") != 1:
        raise UserError(f"{source}: no such file, and not a data set id of the form owner/name or owner/name:split")
    try:
        import datasets
    except ImportError:
        raise UserError(f'{source}: data sets from the hub need the datasets package: pip install "lite-dil[hub]"') from None
    try:
        rows = datasets.load_dataset(name, split=named_split or split)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be loaded from the hub ({first_line(error)})") from None
    for number, row in enumerate(rows, 1):
        yield f"{source} row {number}", row


def _check(row: Any, place: str, form: str) -> Row:
    fields = FORMS[form]
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object with the fields {', '.join(fields)}, found {_kind(row)}")
    for name in fields:
        if name not in row:
            hint = did_you_mean(name, row.keys() - set(fields)) or f"; the row has {', '.join(map(str, row)) or 'no fields'}"
            raise RowError(f"no field {name!r}{hint}")
    if form == "demonstrations" and "label" in row:
        raise RowError("the row has a 'label', and the rows before it have none; keep one form in a file")
    sides = [name for name in fields if name in ("chosen", "rejected", "completion")]
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = _messages(prompt, "prompt")
        if prompt[-1]["role"] == "assistant":
            raise RowError(
                f"the prompt ends with the assistant's turn; the answer belongs in {' or '.join(map(repr, sides))} alone"
            )
        answers = tuple(_answer(row[side], side) for side in sides)
    else:
        texts = [_text(row[name], name, fields) for name in ("prompt", *sides)]
        prompt, answers = texts[0], tuple(texts[1:])
        if not prompt.strip():
            raise RowError("field 'prompt' is empty")
    for name, text in zip(sides, answers, strict=True):
        if not text.strip():
            raise RowError(f"field {name!r} is empty; an answer needs at least one token")
    if form == "unpaired":
        if not isinstance(row["label"], bool):
            raise RowError(
                f"field 'label' is {_kind(row['label'])} ({row['label']!r}); expected true for a good answer, false for a bad "
                "one"
            )
        return Row(prompt, answers, (CHOSEN if row["label"] else REJECTED,), place, form)
    if form == "pairs" and answers[0].strip() == answers[1].strip():
        raise RowError("'chosen' and 'rejected' are the same text; there is no preference to learn")
    return Row(prompt, answers, (CHOSEN, REJECTED)[: len(answers)], place, form)


def _text(value: Any, field: str, fields: tuple[str, ...] = FORMS["pairs"]) -> str:
    if not isinstance(value, str):
        texts = [name for name in fields if name != "label"]
        raise RowError(f"field {field!r} is {_kind(value)}; expected text, or chat messages in all of {', '.join(texts)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"field {field!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return value


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(f"field {field!r} is {_kind(value)}; expected a list of messages")
    messages = []
    for index, message in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise RowError(f"{where} is {_kind(message)}; expected an object with 'role' and 'content'")
        if lacking := {"role", "content"} - message.keys():
            raise RowError(f"{where} has no {' and no '.join(map(repr, sorted(lacking)))}; expected 'role' and 'content'")
        if message["role"] not in ROLES:
            hint = did_you_mean(str(message["role"]).lower(), ROLES)
            raise RowError(f"{where} has role {message['role']!r}{hint}; expected one of {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": _text(message["content"], f"{where}.content")})
    return messages


def _answer(value: Any, field: str) -> str:
    messages = _messages(value, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowError(
            f"field {field!r} has the roles {[m['role'] for m in messages]}; expected one assistant message, "
            "with everything before it in 'prompt'"
        )
    return messages[0]["content"]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'object'}"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
