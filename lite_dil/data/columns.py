"""A row's columns before its format is read: other names, null ones, messages stored as text, and what is not text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lite_dil.base.errors import did_you_mean
from lite_dil.base.jsonl import is_json
from lite_dil.base.strict_json import parse_json
from lite_dil.data.draft import Raw
from lite_dil.data.files import Cell, RowError
from lite_dil.data.messages import is_message, kind_of

# Columns that hold lists, as JSON where a file holds only text; other texts stay text even if they look like JSON, since a
# response may be JSON.
_LISTS = {
    *("tools", "history", "conversations", "messages", "responses", "completions", "answers", "candidates", "generations"),
    *("outputs", "scores", "overall_scores", "ratings", "rewards", "ranks", "turns"),
    *("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"),
}
_SAID = ("response", "answer", "completion", "output", "text", "reply", "message", "messages", "conversation", "conversations")
# Other names of fields: chosen_response (argilla), rejected_response and rejected_messages (ms-swift), chosen_messages
# (LLaMA-Factory v1), system_prompt (OpenOrca).
_OTHER_NAMES = {
    **{name: side for side in ("chosen", "rejected") for said in _SAID for name in (f"{side}_{said}", f"{said}_{side}")},
    **dict.fromkeys(("system_prompt", "system_message"), "system"),
}
# Where the chosen response is if a row names only the rejected one.
_CONVERSATIONS, _ANSWERS = ("messages", "conversations"), ("completion", "response", "answer", "output")
# Columns in which messages or texts for the model are expected.
_TEXTS = {
    *("prompt", "chosen", "rejected", "completion", "messages", "conversations", "instruction", "input", "output", "system"),
    *("question", "query", "context", "history", "response", "conversation_a", "conversation_b"),
    *(f"response{joint}{which}" for joint in ("", "_") for which in ("0", "1", "2", "a", "b")),
}
# Messages as Python prints them: [{'role': ..., numpy's arrays without commas, or objects as Message(role='user', ...).
_PRINTED = re.compile(
    r"\s*(?:array\(|[\[(])*\s*(?:\{\s*['\"](?:role|from|content|value|name)['\"]\s*:|\w*\((?:role|content)=['\"]).*[\]})]\s*\Z",
    re.S,
)
_SPEAKER = re.compile(r"['\"]?\b(?:role|from)['\"]?\s*[:=]")
_MEDIA = re.compile(r"(?P<before>.*_)?(?:image|img|video|audio)s?(?P<after>_(?:path|file|url|bytes|base64|data)s?)?", re.I)
_PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)[a-z_0-9]*\|?>|<\|vision_start\|>", re.I)
# Columns that hold the question, if a row has no prompt.
_QUESTIONS = {
    *("question", "questions", "query", "input", "inputs", "problem", "trajectory", "instruction"),
    *("instructions", "request", "user_input", "user_prompt", "user_query", "user_question", "user_message"),
    *("prompt_text", "input_text", "question_text"),
}
# Last words in the names of columns that hold no question: about a row, or about its responses.
_ABOUT_ROW = {
    *("id", "ids", "uid", "uuid", "hash", "index", "source", "sources", "origin", "category", "categories"),
    *("subcategory", "class", "model", "models", "type", "kind", "name", "split", "subset", "dataset", "domain"),
    *("tag", "tags", "topic", "label", "labels", "lang", "language", "license", "author", "annotator"),
    *("annotators", "judge", "date", "time", "timestamp", "created", "url", "urls", "link", "path", "file"),
    *("status", "version", "score", "scores", "rating", "ratings", "metadata", "system", "tools", "chosen"),
    *("rejected", "response", "responses", "answer", "answers", "completion", "output", "outputs", "generation"),
    *("generations", "rationale", "rationales", "reason", "reasons", "explanation", "feedback", "comment"),
    *("comments", "critique", "note", "notes", "justification", "judgement", "judgment", "strength", "statement"),
    *("elaboration", "reference"),
}
_REJECTED = {
    *("rejected", "reject", "dispreferred", "unpreferred", "unchosen", "loser", "losing", "worse", "worst", "bad", "negative"),
    "disliked",
}
NULL = "null"
_PLAIN = frozenset((str, Cell, list, dict, int, float, bool, type(None)))
_OPENING = frozenset('[{" \n\r\t')  # what may stand before JSON


@dataclass(frozen=True)
class About:
    """What a source's first rows say together.

    Attributes:
        prompted: whether any has a prompt, so that a row without one lacks it.
        question: a column that may be the question: its texts differ, and are sentences.
        counts_from: the number of the first response where a column holds the number of the better one; None if unknown.
    """

    prompted: bool = False
    question: str = ""
    counts_from: int | None = None
    numbers_clash: bool = False  # it holds 0 and 2


class Columns(dict[str, Any]):
    """A row without its null columns.

    Attributes:
        left_out: what was in each column left out: "null", or "an empty cell" of a CSV file.
        about: what the source's first rows say.
    """

    def __init__(self, values: Any = (), left_out: dict[str, str] | None = None, about: About | None = None) -> None:
        super().__init__(values)
        self.left_out, self.about = left_out or {}, about or About()

    def with_fields(self, **fields: Any) -> Columns:
        """Return the same row with other or further fields."""
        return Columns({**self, **fields}, self.left_out, self.about)


def about_of(row: Raw) -> About:
    """Return what the first rows of a row's source say; nothing for a row by itself."""
    return row.about if isinstance(row, Columns) else About()


class Recorded(Columns):
    """The same columns; `taken` has the names of those whose content was asked for."""

    def __init__(self, row: Columns) -> None:
        super().__init__(row, row.left_out, row.about)
        self.taken = set[str]()

    def __getitem__(self, name: str) -> Any:
        self.taken.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a column's content, or `default`."""
        self.taken.add(name)
        return super().get(name, default)


def tidy(value: Any, columns: dict[str, str] | None = None, about: About | None = None) -> Any:
    """Return a row's columns under their fields' names, without null ones, messages stored as text parsed.

    Anything but a dict is returned unchanged.

    Raises RowError if a column of `columns`, the map of --columns, is missing.
    """
    if not isinstance(value, dict):
        return value
    row = renamed(value, columns) if columns else value
    left_out: dict[str, str] = {}
    kept: dict[str, Any] = {}
    other = False
    for name, v in row.items():
        if type(v) not in _PLAIN and hasattr(v, "tolist"):  # numpy's arrays and numbers, in a program's rows
            v = v.tolist()
        if type(v) is str or type(v) is Cell:
            if v[:1] in _OPENING and (found := _stored(name, v)) is not None:
                v = found
            elif not v and type(v) is Cell:
                left_out[name] = "an empty cell"
                continue
        elif v is None or (isinstance(v, float) and v != v):
            left_out[name] = NULL
            continue
        other = other or name in _OTHER_NAMES or name == "rejected"
        kept[name] = v
    if other:
        _named(kept)
    return Columns(kept, left_out, about)


def renamed(value: Any, columns: dict[str, str]) -> Any:
    """Return a row with its columns renamed to fields by the map of `parse_columns`. Raises RowError."""
    if not columns or not isinstance(value, dict):
        return value
    for column in columns.values():
        if column not in value:
            hint = did_you_mean(column, map(str, value))
            raise RowError(f"no column {column!r}", f"no column {column!r}, which --columns names{hint}")
    moved = {name: value[column] for name, column in columns.items()}
    return {name: v for name, v in value.items() if name not in columns.values()} | moved


def _named(row: dict[str, Any]) -> None:
    """Give fields under another name their own, and a rejected response the chosen one beside it."""
    for name, field in _OTHER_NAMES.items():
        if name in row and field not in row:
            row[field] = row.pop(name)
    rejected = row.get("rejected")
    if "chosen" in row or not rejected or not isinstance(rejected, (str, list, dict)) or is_word(rejected):
        return
    for name in _CONVERSATIONS:
        turns = row.get(name)
        if isinstance(turns, list) and turns and is_message(turns[-1], "assistant"):
            row["chosen"] = row.pop(name)
            return
    for name in _ANSWERS:
        if isinstance(row.get(name), (str, dict)) and row[name]:
            row["chosen"] = row.pop(name)
            return


def is_word(value: Any) -> bool:
    """Return whether a CSV cell is true or false, in any case."""
    return isinstance(value, Cell) and value.strip().lower() in ("true", "false")


def _stored(name: str, text: str) -> Any:
    """Return the messages, or the list of a column that holds lists, that a text encodes as JSON; None for other texts."""
    if text.lstrip()[:1] not in ("[", "{", '"'):
        return None
    with suppress(ValueError):
        value = parse_json(text)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # encoded twice
            value = parse_json(value)
        if isinstance(value, dict) and len(value) == 1 and isinstance(inner := next(iter(value.values())), list):
            value = inner if any(map(is_message, inner)) else value  # {"messages": [...]}
        if isinstance(value, (list, dict)):
            messages = value if isinstance(value, list) and value else [value]
            if name in _LISTS or (all(isinstance(m, dict) for m in messages) and any(map(is_message, messages))):
                return value
    return None


def refuse_unreadable(row: Raw) -> None:
    """Raise RowError for a row with images, videos or audio, or with messages as Python prints them."""
    for name, value in row.items():
        if not (match := _media(name)):
            continue
        # image_url may be a fact about a text; not so where the text has a place for it.
        if _holds(value) and (match == "whole" or _PLACEHOLDER.search(repr(dict(row)))):
            raise RowError("not text", f"field {name!r} holds {_found(value)}; only text can be trained on")
    for name, value in row.items():
        if name not in _TEXTS:
            continue
        if isinstance(value, str) and _PRINTED.match(value) and _SPEAKER.search(value) and not is_json(value):
            raise RowError(
                "messages as text",
                f"field {name!r} is text in which Python printed messages ({value.strip()[:20]!r}...), not messages; write "
                "rows with json.dumps, or as Parquet",
            )


@lru_cache(4096)
def _media(name: Any) -> str:
    match = _MEDIA.fullmatch(str(name))
    return "" if not match else "part" if match["before"] or match["after"] else "whole"


def _holds(value: Any) -> bool:
    """Return whether a column of images and the like holds any."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds, value))
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    if isinstance(value, (str, bytes)):
        return value.strip() not in ("", "[]", "{}", b"")
    return value is not None and not isinstance(value, (bool, int, float))


def _found(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else kind_of(value)


def learn(rows: Iterable[Any], numbers: Sequence[str] = ()) -> About:
    """Return what tidied rows say together; `numbers` are the columns that may hold the number of the better response."""
    found = [row for row in rows if isinstance(row, dict)]
    prompted = any(row.get("prompt") not in (None, "", []) for row in found)
    counted = {row[name] for row in found for name in numbers if type(row.get(name)) in (int, float, Cell)}
    counted = {int(float(value)) for value in counted if str(value) in ("0", "1", "2", "0.0", "1.0", "2.0")}
    start = {(0, 1): 0, (0,): 0, (1, 2): 1, (2,): 1}.get(tuple(sorted(counted)))
    return About(prompted, "" if prompted else _column_of_questions(found), start, {0, 2} <= counted)


def question_of(row: Raw) -> str:
    """Return a column named like a question that has text, or one of messages; empty if there is none."""
    for name, value in row.items():
        words = _words(name)
        if "_".join(words) in _QUESTIONS and isinstance(value, str) and value.strip():
            return str(name)
        if isinstance(value, list) and value and is_message(value[0]) and not _is_about(words):
            return str(name)
    question = about_of(row).question
    return question if question in row else ""


def rejected_of(row: Raw) -> str:
    """Return a column with text or messages named like a rejected response; empty if there is none."""
    for name, value in row.items():
        words = _words(name)
        named = _REJECTED & set(words) and not {"model", "id", "score", "name", "source", "reason", "rating"} & set(words)
        if named and isinstance(value, (str, list, dict)) and value and value != [None]:
            return str(name)
    return ""


@lru_cache(4096)
def _words(name: Any) -> tuple[str, ...]:
    """Return the words of a column's name: user_prompt, userPrompt, "user prompt"."""
    return tuple(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", " ", str(name)).lower().split())


def _is_about(words: tuple[str, ...]) -> bool:
    """Return whether a column's name says that it holds no question: question_id, chosen_model, source."""
    return not words or words[-1] in _ABOUT_ROW or bool({"chosen", "rejected"} & set(words))


def _column_of_questions(rows: list[Any]) -> str:
    """Return a column of pairs of texts whose own texts differ in most rows and are mostly sentences."""
    pairs = [row for row in rows if all(isinstance(row.get(side), str) for side in ("chosen", "rejected"))]
    for name in dict.fromkeys(name for row in pairs for name in row):
        if name == "prompt" or _is_about(_words(name)):
            continue
        texts = [
            row[name] for row in pairs if isinstance(row.get(name), str) and row[name] not in (row["chosen"], row["rejected"])
        ]
        if len(set(texts)) > len(pairs) / 2 and sum(map(_is_sentence, texts)) > len(texts) / 2:
            return str(name)
    return ""


def _is_sentence(text: str) -> bool:
    letters = sum(map(str.isalpha, text))
    long = len(text.split()) >= 3 or sum(char > "\u2e7f" for char in text) >= 4  # some scripts have no spaces
    return long and letters > 0.6 * len("".join(text.split()))
