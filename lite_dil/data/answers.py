"""Read prompts with any number of responses, to be scored: answers of lite-dil generate, lists of responses, training data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.signs import CHOSEN
from lite_dil.data.columns import Columns, learn, tidy
from lite_dil.data.compared import BETTER
from lite_dil.data.draft import Draft, refuse_ids
from lite_dil.data.files import RowError
from lite_dil.data.format_readers import LISTS, QUESTIONS, text_of
from lite_dil.data.formats import format_of, read
from lite_dil.data.messages import Completion, kind_of, read_answer
from lite_dil.data.options import DataOptions
from lite_dil.data.prompts import Prompt
from lite_dil.data.reader import LOOKED_AT, Problem, check_prompt, parse_columns, refuse
from lite_dil.data.sources import records, split_sources

ANSWERS_HELP = (
    "answers to score: rows with 'prompt' and 'completion', 'response' or a list 'responses', or the rows of any data that "
    "lite-dil train takes, both sides of which are scored"
)
_EXPECTED = "prompt and completion, response or responses; or the rows of any data that lite-dil train takes"


@dataclass(frozen=True)
class AnswerRow:
    """A row's prompt and responses.

    Attributes:
        id: the row's own column 'id' if it has one, else where it came from.
        labels: what the row says of each response: True for chosen, False for rejected, None for nothing.
        cut: whether the row says that its response was cut before its end ("finish_reason": "length").
    """

    prompt: Prompt
    answers: tuple[Completion, ...]
    id: str | int
    labels: tuple[bool | None, ...]
    cut: bool


def read_answers(source: str, options: DataOptions, chat: bool, say: Callable[[str], None]) -> list[AnswerRow]:
    """Read all rows of one or several sources, in order.

    Args:
        source: see `lite_dil.data.sources.records`.
        options: `data_format`, `columns`, `max_rows` and `skip_bad_rows` decide how rows are read.
        chat: whether plain-text prompts become user messages.
        say: is told how many rows are left out.

    Raises UserError if some rows are unusable, unless `options.skip_bad_rows` leaves them out, or if there are none.
    """
    found: list[AnswerRow] = []
    for name, times in split_sources(source):
        if times != 1:
            raise UserError(f"{source}: each row is scored once; leave ={times:g} out")
        problems, before = list[Problem](), len(found)
        for place, value in _rows(name, options):
            try:
                if isinstance(value, RowError):
                    raise value
                found.append(_row(value, place, options.data_format, chat))
            except RowError as error:
                problems.append(Problem(error.kind, place, str(error)))
        kept = len(found) - before
        refuse(name, [] if options.skip_bad_rows and kept else problems, kept, _EXPECTED)
        if problems:
            say(f"{name}: {len(problems)} rows that cannot be used are left out; the first: {problems[0].place}")
    return found


def _rows(name: str, options: DataOptions) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a source with their columns under the names that formats use."""
    columns, rows = parse_columns(options.columns), records(name, limit=options.max_rows)
    head = list(itertools.islice(rows, LOOKED_AT))
    about = learn((tidy(v, columns) for _, v in head if isinstance(v, dict) and v.keys() >= set(columns.values())), BETTER)
    for place, value in itertools.chain(head, rows):
        try:
            yield place, value if isinstance(value, RowError) else tidy(value, columns, about)
        except RowError as error:
            yield place, error


def _row(row: Any, place: str, format: str, chat: bool) -> AnswerRow:
    if not isinstance(row, Columns):
        raise RowError("not an object", f"expected a JSON object with 'prompt' and 'completion', found {kind_of(row)}")
    draft, labels = _draft(row, format, chat)
    refuse_ids(draft)
    check_prompt(draft.prompt)
    said = row.get("id")
    return AnswerRow(
        Prompt(draft.prompt, place, draft.tools, arguments=draft.arguments),
        draft.answers,
        said if isinstance(said, (str, int)) and not isinstance(said, bool) else place,
        labels,
        row.get("finish_reason") == "length",
    )


def _draft(row: Columns, format: str, chat: bool) -> tuple[Draft, tuple[bool | None, ...]]:
    """Return a row's content, and what it says of each response."""
    several = next((name for name in LISTS if isinstance(row.get(name), list) and row[name]), "")
    if several and not (row.get("chosen") and row.get("rejected")):
        answers = tuple(read_answer(text_of(item), f"{several}[{i}]") for i, item in enumerate(row[several]))
        asked = next((row[name] for name in QUESTIONS if name in row), None)
        if asked is None:
            raise RowError("no field 'prompt'", f"no field 'prompt'; the row has {', '.join(map(str, row))}")
        single = Columns({k: v for k, v in row.items() if k not in (*LISTS, *QUESTIONS)}, row.left_out, row.about)
        draft = read(single.with_fields(prompt=asked, completion="x"), "completion", chat)
        return draft._replace(answers=answers, signs=(CHOSEN,) * len(answers)), (None,) * len(answers)
    if isinstance(row.get("response"), str) and "completion" not in row:
        row = row.with_fields(completion=row["response"])
    draft = read(row, (format_of(row) or "completion") if format == "auto" else format, chat)
    told = len(draft.answers) > 1 or draft.labelled
    return draft, tuple(sign == CHOSEN if told else None for sign in draft.signs)
