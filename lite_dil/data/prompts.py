"""Read prompts for generation, from files of prompts or from any training data."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.data.arguments import FIELD
from lite_dil.data.columns import Columns, learn, refuse_unreadable, tidy
from lite_dil.data.compared import BETTER
from lite_dil.data.draft import Draft, Tie, refuse_ids
from lite_dil.data.encoder import Encoder, continuation_text, encoder_of
from lite_dil.data.files import PlacedRow, RowError, text_lines
from lite_dil.data.formats import format_of, read
from lite_dil.data.messages import Completion, Message, is_message, kind_of, read_text
from lite_dil.data.options import DataOptions
from lite_dil.data.reader import LOOKED_AT, Problem, check_prompt, parse_columns, refuse
from lite_dil.data.rows import DATA, Rows
from lite_dil.data.sources import records, split_sources
from lite_dil.models.find import resolve_model
from lite_dil.models.options import ModelOptions

# The flags of train that decide how prompts are read.
FLAGS = ("data_format", "columns", "max_rows", "skip_bad_rows", "max_length")
PROMPTS_HELP = (
    "prompts: a .txt file with one per line, or rows (JSON Lines, JSON, CSV, ...) with 'prompt', 'messages' or 'turns', or "
    "the prompts of any data that lite-dil train takes"
)
_EXPECTED = "prompt, as text or messages; messages, or conversations; or the rows of any data that lite-dil train takes"
_KINDS = {False: "plain text", True: "chat messages"}
_FIRST_TURN = "prompts of several turns: only the first is asked"
_ASKING = {"prompt", "messages", "conversations", "turns", "instruction", "input", "system"}  # columns that make the prompt
_BESIDE = {"prompt", "system"}  # of those, what is read where there is a prompt
_ASSISTANT = {"role": "assistant", "content": "x"}


@dataclass(frozen=True)
class Prompt:
    """A prompt, text or chat messages; `place` is where it came from and `ids` are its tokens.

    `columns` are the row's others than the prompt's own, as they were read.
    """

    prompt: str | list[Message]
    place: str
    tools: list[dict[str, Any]] | None = None
    ids: tuple[int, ...] = ()
    arguments: dict[str, Any] | None = None
    columns: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def chat(self) -> bool:
        """Whether it is chat messages."""
        return not isinstance(self.prompt, str)

    @property
    def key(self) -> str:
        """A hash of it that does not depend on where it came from."""
        return key_of(self.row())

    def row(self, **answers: Completion) -> dict[str, Any]:
        """Return a data row with this prompt and `answers` by field, in the prompt's own form."""

        def spoken(answer: Completion) -> Message:
            return answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}

        said = {name: [spoken(answer)] if self.chat else answer for name, answer in answers.items()}
        further = {"tools": self.tools, FIELD: self.arguments}
        return {"prompt": self.prompt, **said, **{name: value for name, value in further.items() if value}}

    def answer(self, encoder: Encoder, ids: Sequence[int]) -> Completion:
        """Return a response without control tokens and its end: text; in a chat the message, if it holds more than text."""
        if not self.chat:
            return continuation_text(encoder.tokenizer, self.ids, ids, plain=True)
        message = encoder.message(self.ids, ids)
        return message if len(message) > 2 else str(message["content"])

    def text(self, encoder: Encoder, ids: Sequence[int]) -> str:
        """Return what a response says; in a chat, without surrounding space."""
        answer = self.answer(encoder, ids)
        return answer if isinstance(answer, str) else str(answer["content"])


def key_of(row: dict[str, Any]) -> str:
    """Return the `Prompt.key` of the prompt in a row made by `Prompt.row`."""
    arguments = [row[FIELD]] if row.get(FIELD) else []
    return digest(json.dumps([row["prompt"], row.get("tools"), *arguments], sort_keys=True))


def read_prompts(
    source: str,
    options: DataOptions,
    chat: bool,
    say: Callable[[str], None],
    given: Rows | None = None,
    alike: bool = False,
) -> list[Prompt]:
    """Read all prompts of one or several sources, each once, in order.

    Args:
        alike: whether rows with the same prompt must have the same other columns, since a reward reads them.
        source: see `lite_dil.data.sources.records`; a .txt file has one prompt per line.
        options: the options in `FLAGS` decide how rows are read.
        chat: whether plain-text prompts become user messages.
        given: a program's own rows, which replace the sources.

    Raises:
        UserError: some rows are unusable, unless `options.skip_bad_rows` leaves them out, or there are none.
    """
    found: dict[str, Prompt] = {}
    columns, notes, repeats, first = parse_columns(options.columns), Counter[str](), 0, None
    for name, times in [(DATA, 1.0)] if given else split_sources(source):
        if times != 1:
            raise UserError(f"{source}: each prompt is used once; leave ={times:g} out")
        problems, kept = list[Problem](), 0
        rows = itertools.islice(given.records(), options.max_rows) if given else _records(name, options.max_rows)
        head = list(itertools.islice(rows, LOOKED_AT))
        about = learn((tidy(v, columns) for _, v in head if isinstance(v, dict) and v.keys() >= set(columns.values())), BETTER)
        for place, value in itertools.chain(head, rows):
            try:
                if isinstance(value, RowError):
                    raise value
                draft = _draft(tidy(value, columns, about), options.data_format, chat)
                check_prompt(draft.prompt)
                others = _others(value, columns.get("prompt", "prompt"))
                prompt = Prompt(draft.prompt, place, draft.tools, arguments=draft.arguments, columns=others)
                if alike:
                    _check_alike(prompt, found.get(prompt.key))
                first = first or prompt
                _check_kind(prompt, first)
            except Tie as tie:
                notes[str(tie)] += 1
                continue
            except RowError as error:
                problems.append(Problem(error.kind, place, str(error)))
                continue
            kept += 1
            notes.update(draft.notes)
            repeats += prompt.key in found
            found.setdefault(prompt.key, prompt)
        refuse(name, [] if options.skip_bad_rows and kept else problems, kept, _EXPECTED)
        if problems:
            several = "rows that cannot be used are" if len(problems) > 1 else "row that cannot be used is"
            say(f"{name}: {len(problems)} {several} left out")
    for note, count in notes.items():
        say(f"{count} {note}")
    if repeats:
        say(f"{repeats} prompt{'s repeat' if repeats > 1 else ' repeats'} an earlier one: each is used once")
    return list(found.values())


def _check_kind(prompt: Prompt, first: Prompt) -> None:
    """Raise RowError if a prompt is of another kind than the first one."""
    if prompt.chat != first.chat:
        raise RowError(
            "mixed formats",
            f"the prompt is {_KINDS[prompt.chat]}, but {first.place} has {_KINDS[first.chat]}; keep one kind in a file, or "
            "make all of them messages with --chat",
        )


def _others(row: dict[str, Any], asked: str) -> dict[str, Any]:
    """Return the columns that are no part of the prompt, which is in the column `asked`, if that has one."""
    own = _BESIDE if row.get(asked) else _ASKING
    return {name: value for name, value in row.items() if name not in own and name != asked}


def _check_alike(prompt: Prompt, earlier: Prompt | None) -> None:
    """Raise RowError if a row repeats an earlier one's prompt with other columns."""
    if earlier and earlier.columns != prompt.columns:
        changed = sorted(set(earlier.columns) ^ set(prompt.columns)) or [
            name for name, value in prompt.columns.items() if earlier.columns[name] != value
        ]
        raise RowError(
            "prompts with several answers",
            f"the prompt is that of {earlier.place}, but its {changed[0]!r}, which a reward may read, is another; keep one",
        )


def encode_prompts(
    prompts: Sequence[Prompt], encoder: Encoder, options: DataOptions, room: int, say: Callable[[str], None]
) -> list[Prompt]:
    """Return the prompts with their tokens, cut from the left if they do not leave `room` in ``--max-length``.

    Raises:
        UserError: the model's template or tokenizer refuses some prompts, unless `options.skip_bad_rows` leaves them out.
    """
    limit = options.max_length - room
    if limit < 1:
        raise UserError(f"--max-new-tokens {room} leaves no room for a prompt in --max-length {options.max_length}")
    encoded: list[Prompt] = []
    problems: list[Problem] = []
    cut = 0
    encoder.rendering.notes.clear()
    for prompt in prompts:
        try:
            ids = _ids(prompt, encoder)
        except RowError as error:
            problems.append(Problem(error.kind, prompt.place, str(error)))
            continue
        if len(ids) > limit:
            cut, ids = cut + 1, ids[:1] + ids[len(ids) - limit + 1 :]
        encoded.append(replace(prompt, ids=ids))
    refuse("prompts", [] if options.skip_bad_rows and encoded else problems, len(encoded), _EXPECTED)
    if problems:
        say(f"{len(problems)} prompts that the model cannot take are left out; the first: {problems[0].place}")
    for note in sorted(encoder.rendering.notes):
        say(f"some prompts: {note}")
    if cut:
        say(f"{cut} prompts are cut from the left to {limit} tokens, by --max-length {options.max_length}")
    return encoded


def read_and_encode(
    source: str, options: DataOptions, model: ModelOptions, chat: bool | None, room: int, say: Callable[[str], None]
) -> tuple[list[Prompt], bool]:
    """Read prompts and tokenise them for the model; only its tokenizer is loaded.

    Args:
        model: the model, its template's arguments, and whether its own code may run.
        chat: whether plain-text prompts become user messages; None means only the lines of .txt files, if the model has a
            chat template.
        room: maximum tokens of a response.

    Returns:
        The prompts, and whether the model has a chat template.
    """
    encoder = encoder_of(resolve_model(model.model, say), model)
    chats = bool(encoder.tokenizer.chat_template)
    lines = all(Path(name).suffix == ".txt" for name, _ in split_sources(source))
    found = read_prompts(source, options, lines and chats if chat is None else chat, say)
    return encode_prompts(found, encoder, options, room, say), chats


def _ids(prompt: Prompt, encoder: Encoder) -> tuple[int, ...]:
    ids = encoder.prompt(prompt.prompt, prompt.tools, prompt.arguments)
    if not ids:
        raise RowError("empty prompt", "the prompt has no token, so nothing predicts the first token of a response")
    return ids


def _records(source: str, limit: int | None) -> Iterator[PlacedRow]:
    if Path(source).suffix != ".txt":
        yield from records(source, limit=limit)
        return
    for number, (place, line) in enumerate(text_lines(Path(source))):
        if number == limit:
            return
        yield place, line if isinstance(line, RowError) else {"prompt": line}


def _draft(row: Any, format: str, chat: bool) -> Draft:
    """Read a row in its format. A row without a response gets a placeholder, which is not used."""
    if not isinstance(row, Columns):
        raise RowError("not an object", f"expected a JSON object with 'prompt' or 'messages', found {kind_of(row)}")
    known, notes = format_of(row), tuple[str, ...]()
    if not known:  # a label, such as a topic, makes nothing of the placeholder
        row = Columns({name: v for name, v in row.items() if name not in ("label", "kto_tag")}, row.left_out, row.about)
    if known in ("messages", "sharegpt"):
        field = "messages" if known == "messages" else "conversations"
        if not row.get("chosen") and not is_message(row[field][-1], "assistant"):
            row = row.with_fields(**{field: [*row[field], _ASSISTANT]})
    elif not known and row.get("turns") not in (None, "", []):
        turns = row["turns"] if isinstance(row["turns"], list) else [row["turns"]]
        first = turns[0].get("content") if isinstance(turns[0], dict) else turns[0]
        notes = (_FIRST_TURN,) if len(turns) > 1 else ()
        row = row.with_fields(prompt=[{"role": "user", "content": read_text(first, "turns[0]")}], completion="x")
    elif not known and "prompt" in row:
        row = row.with_fields(completion="x")
    elif not known and "instruction" in row:
        row = row.with_fields(output="x")
    elif not known:
        refuse_unreadable(row)  # of the other rows `read` does
        near = next((name for name in ("question", "query", "text", "input", "problem") if isinstance(row.get(name), str)), "")
        hint = f"; if it is {near!r}: --columns prompt={near}" if near else ""
        raise RowError("no field 'prompt'", f"no field 'prompt'; the row has {', '.join(map(str, row)) or 'none'}{hint}")
    draft = read(row, format_of(row) if format == "auto" else format, chat)
    refuse_ids(draft)
    return draft._replace(notes=(*draft.notes, *notes))
