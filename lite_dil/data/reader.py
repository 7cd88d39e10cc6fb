"""Read data: every row is checked at once, and every problem names its file, line, field and fix."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lite_dil.base.errors import UserError, did_you_mean, gather
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.data.columns import Columns, Recorded, learn, rejected_of, tidy
from lite_dil.data.compared import BETTER
from lite_dil.data.draft import Draft, Tie
from lite_dil.data.files import Loose, RowError
from lite_dil.data.formats import FORMATS, ROW_FIELDS, detect, format_of, prompts_only, read
from lite_dil.data.messages import Completion, Message
from lite_dil.data.rows import DATA, Rows
from lite_dil.data.sources import EMBEDDED, records, split_sources

__all__ = ["CHOSEN", "EMBEDDED", "REJECTED", "Completion", "Message", "Problem", "Reader", "Row", "RowError", "parse_columns"]

LOOKED_AT = 100  # rows from which the format is detected
NO_RESPONSE = "no response"
MARGIN = "margin"  # of pairs, for a reward model by bt
_PROMPTS_ARE_FOR = "Prompts without responses are for lite-dil label, which makes pairs of them, and lite-dil generate"
# Characters that show nothing and change nothing: two texts that differ only in them look the same to a reader. Joiners
# (U+200C, U+200D) are not among them: they change Persian words and emoji.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))


@dataclass(frozen=True)
class Row:
    """One row: a prompt and its responses, each with the sign ``CHOSEN`` or ``REJECTED``.

    A pair has one of each, an unpaired row a single response, a demonstration a single chosen one. With `chat` the prompt is a
    list of messages, rendered by the model's chat template with the `tools` and the row's own `arguments` of the template;
    otherwise it is plain text that the responses continue. `margin` is by how much the reward of a pair's chosen response
    should be above the other's, where it is read. With `ids`, the token ids of the prompt and of each response, there is no
    text. `place` is where the row came from, for error messages.
    """

    prompt: str | list[Message]
    answers: tuple[Completion, ...]
    signs: tuple[int, ...]
    place: str
    form: str
    tools: list[dict[str, Any]] | None = field(default=None, compare=False)
    arguments: dict[str, Any] | None = field(default=None, compare=False)
    margin: float = 0.0
    ids: tuple[tuple[int, ...], ...] = ()

    @property
    def chat(self) -> bool:
        """Whether the prompt is chat messages."""
        return not isinstance(self.prompt, str)


class Problem(NamedTuple):
    """Why a row is left out: a few words shared by all such rows, where it is, and the full message."""

    kind: str
    place: str
    message: str


class Reader:
    """Reads one source, row by row; iterate over it only once.

    Unusable rows are left out and added to `problems`. All rows must have the form of the first usable one, and be all chat
    messages or all plain text.

    Args:
        source: see `lite_dil.data.sources.records`.
        split: the split to take if `source` names none.
        format: a name in `lite_dil.data.formats.FORMATS`, or "auto" to detect it from the first rows.
        columns: the column to read a field from, if their names differ; see `parse_columns`.
        limit: read at most this many rows.
        chat: whether plain-text prompts become user messages.
        rows: rows to read instead of `source`, which then names them in messages.
        margins: whether to read the column 'margin' of pairs, which all rows have or none.

    Attributes:
        format: the name of the format, once a row was read.
        form: "pairs", "unpaired" or "demonstrations", of the rows read so far.
        chat: whether prompts are chat messages.
        problems: what was left out and why, in the order of the source.
        notes: changes to rows that their owner should know about, and to how many rows; and rows left out as ties.
        unread: columns of which nothing is read.
    """

    def __init__(
        self,
        source: str,
        split: str = "train",
        *,
        format: str = "auto",
        columns: dict[str, str] | None = None,
        limit: int | None = None,
        chat: bool = False,
        rows: Rows | None = None,
        margins: bool = False,
    ) -> None:
        self._margins, self._margin = margins, False
        self.source, self.format, self.columns = source, format, columns or {}
        self.form, self.chat, self._first, self._to_chat = "", False, "", chat
        self._seen, self._taken = dict[str, None](), set[str]()
        self._whole, self._one = (DATA, "the data") if rows else ("file", "a file")
        self.problems: list[Problem] = []
        self.notes: Counter[str] = Counter()
        self._records = itertools.islice(rows.records(), limit) if rows else records(source, split, limit)

    @property
    def unread(self) -> list[str]:
        """Columns of which nothing is read, judged by the first rows that have them."""
        return [name for name in self._seen if name not in self._taken]

    def _note(self, row: Any) -> None:
        """Note which columns of a row were read."""
        if isinstance(row, Recorded) and row.taken:
            self._seen |= dict.fromkeys(row)
            self._taken |= row.taken | {name for name, value in row.items() if value in ("", [], {})}

    def __iter__(self) -> Iterator[Row]:
        head = list(itertools.islice(self._records, LOOKED_AT))
        named = [tidy(v, self.columns) for _, v in head if isinstance(v, dict) and v.keys() >= set(self.columns.values())]
        self._about = learn(named, BETTER)
        if self.format == "auto":
            self.format = detect(named)
        for number, (place, value) in enumerate(itertools.chain(head, self._records)):
            try:
                if isinstance(value, RowError):
                    raise value
                loose = self._loose(value)
                value = self._recorded(tidy(value, self.columns, self._about), number < LOOKED_AT or bool(loose))
                row = self._row(value, place)
                self._note(value)
                self._refuse_loose(value, loose, row.form)
            except Tie as tie:
                self.notes[str(tie)] += 1
                continue
            except RowError as error:
                self._note(value)
                self.problems.append(Problem(error.kind, place, str(error)))
                continue
            yield row

    def _loose(self, row: Any) -> set[str]:
        """Return the fields, or columns, of a JSON row that hold NaN or an infinity."""
        if not isinstance(row, Loose):
            return set()
        return {field for field, column in self.columns.items() if column in row.columns} | row.columns

    def _refuse_loose(self, row: Any, loose: set[str], form: str) -> None:
        """Raise RowError if a column that was read holds NaN or an infinity; note it of others."""
        # Without a label the row was taken for one that has none.
        if loose and (read := sorted(loose & (row.taken | ({"label"} if form == "demonstrations" else set())))):
            raise RowError(
                "not JSON", f"field {read[0]!r} holds NaN or Infinity, which is not JSON; expected a number, or null for none"
            )
        if loose:
            self.notes["NaN or Infinity in columns that are not read"] += 1

    def _recorded(self, row: Any, first: bool) -> Any:
        """Return a row that notes which of its columns are read, if it is one of the first or has a column that they lack."""
        if not isinstance(row, Columns) or not (first or not row.keys() <= self._seen.keys()):
            return row
        return Recorded(row)

    def _row(self, value: Any, place: str) -> Row:
        try:
            draft = read(value, self.format, self._to_chat)
        except Tie:
            raise
        except RowError as error:
            plain = dict(value) if isinstance(value, dict) else {}
            if not self._first and error.kind.startswith("no") and prompts_only(plain):
                raise RowError(NO_RESPONSE, f"{error}. {_PROMPTS_ARE_FOR}") from None
            other = format_of(plain)
            if other and other != self.format and error.kind.startswith("no field"):
                raise RowError(
                    "mixed formats",
                    f"{error}. The row looks like {FORMATS[other].title} ({other}), but the {self._whole} is read as "
                    f"{self.format}; keep one format in {self._one}",
                ) from None
            raise
        if len(draft.signs) == 1 and not draft.labelled and (column := rejected_of(value)):
            raise RowError(
                "rejected response in another column",
                f"the row is read as {FORMATS[self.format].title}, and {column!r} may be its rejected response: --columns "
                f"rejected={column}; if it is not, remove that column",
            )
        row = _checked(draft, place)
        margin = value.get(MARGIN) if self._margins and row.form == "pairs" else None
        if not self._first:
            self._first, self.form, self.chat, self._margin = place, row.form, row.chat, margin is not None
        if row.form != self.form:
            raise RowError(
                "mixed formats", f"the row has {row.form}, but {self._first} has {self.form}; keep one form in {self._one}"
            )
        if row.chat != self.chat:
            kinds = ("plain text", "chat messages")
            raise RowError(
                "mixed formats",
                f"the prompt is {kinds[row.chat]}, but {self._first} has {kinds[self.chat]}; keep one kind in {self._one}",
            )
        if (margin is not None) != self._margin and row.form == "pairs":
            one, other = ("a", "none") if self._margin else ("no", "one")
            raise RowError("mixed margins", f"{self._first} has {one} field 'margin', but the row has {other}; all or no rows")
        if draft.notes:
            self.notes.update(draft.notes)
        return row if margin is None else replace(row, margin=_margin(margin))

    def check(self, kept: int, skip: bool) -> None:
        """Raise UserError if rows are unusable, unless `skip` leaves them out, or `kept` is 0."""
        check_kept(self.source, self.problems, self.notes, kept, skip)


def check_kept(source: str, problems: list[Problem], notes: Counter[str], kept: int, skip: bool) -> None:
    """Raise UserError for what a `Reader` found, if rows are unusable, unless `skip` leaves them out, or `kept` is 0."""
    if skip and kept:
        return
    if not kept and not problems and notes:
        raise UserError(f"{source}: no rows are left; all are {', '.join(notes)}")
    refuse(source, problems, kept)


def read_rows(source: str, split: str = "train", *, skip: bool = False, **settings: Any) -> list[Row]:
    """Read and check all rows of a source, or of several, with the `settings` of `Reader`.

    Raises:
        UserError: some rows are unusable, unless `skip` leaves them out, or there are none.
    """
    found = []
    for name, _ in split_sources(source):
        reader = Reader(name, split, **settings)
        rows = list(reader)
        reader.check(len(rows), skip)
        found += rows
    return found


def refuse(source: str, problems: list[Problem], kept: int, expected: str = "") -> None:
    """Raise UserError if rows are unusable or there are none; `expected` describes valid rows, by default training data."""
    expected = expected or _known()
    if problems:
        lines = [f"{problem.place}: {problem.message}" for problem in problems]
        heading = f"{source}: {len(problems)} of {kept + len(problems)} rows cannot be used (--skip-bad-rows leaves them out):"
        kinds = Counter(problem.kind for problem in problems).most_common()
        counts = "" if len(problems) == 1 else f"\n{', '.join(f'{count} {kind}' for kind, count in kinds)}"
        expects = "" if kept or kinds[0][0] == NO_RESPONSE else f"\nExpected: {expected}"
        raise UserError(gather(lines, heading) + counts + expects)
    if not kept:
        raise UserError(f"{source}: no rows; expected {expected}")


def _known() -> str:
    return "; ".join(f"{', '.join(spec.fields)} ({name})" for name, spec in FORMATS.items())


def parse_columns(text: str | None) -> dict[str, str]:
    """Return the column of each field from text such as ``chosen=good,rejected=bad``."""
    columns: dict[str, str] = {}
    for part in (text or "").split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not (equals and column):
            raise UserError(f"--columns {part}: expected FIELD=COLUMN, such as chosen=good")
        known = [*ROW_FIELDS, MARGIN]
        if name not in known:
            raise UserError(
                f"--columns {part}: unknown field {name!r}{did_you_mean(name, known)}; expected one of {', '.join(known)}"
            )
        columns[name] = column
    return columns


def same_text(answer: Completion) -> Any:
    """Return a form that is equal for responses that look the same: stripped, without zero-width characters, normalised."""
    if isinstance(answer, dict):
        return {**answer, "content": same_text(answer["content"])}
    if answer.isascii():
        return answer.strip()
    return unicodedata.normalize("NFC", answer.translate(_INVISIBLE)).strip()


def check_prompt(prompt: str | list[Message]) -> None:
    """Raise RowError for an empty prompt, or one that ends in a response."""
    if isinstance(prompt, str):
        if not same_text(prompt):
            raise RowError("empty prompt", "field 'prompt' is empty; write one or remove the row")
    else:
        if prompt[-1]["role"] == "assistant":
            raise RowError(
                "prompt ends in a response", "the prompt ends with the assistant's turn; expected the user's (or a tool's)"
            )
        for number, message in enumerate(prompt):
            if message["role"] == "user" and not same_text(message["content"]):
                raise RowError("empty prompt", f"the prompt's message {number + 1}, the user's, is empty")


def _margin(value: Any) -> float:
    """Return a pair's margin. Raises RowError unless it is a finite number."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RowError("margin", f"field 'margin' is {str(value)[:40]!r}; expected a finite number")
    return found


def _checked(draft: Draft, place: str) -> Row:
    """Return a draft as a row, or raise RowError if nothing can be learned from it."""
    form = "pairs" if len(draft.signs) > 1 else "unpaired" if draft.labelled else "demonstrations"
    if draft.ids:  # two draws of a sampler may agree
        return Row(draft.prompt, draft.answers, draft.signs, place, form, ids=draft.ids)
    check_prompt(draft.prompt)
    for answer, sign in zip(draft.answers, draft.signs, strict=True):
        said = answer if isinstance(answer, str) else answer["content"]
        if not said.strip() and not (isinstance(answer, dict) and answer.get("tool_calls")):
            side = "" if len(draft.signs) == 1 else "chosen " if sign == CHOSEN else "rejected "
            raise RowError("empty response", f"the {side}response is empty; write one or remove the row")
    if form == "pairs" and same_text(draft.answers[0]) == same_text(draft.answers[1]):
        raise RowError(
            "identical responses", "'chosen' and 'rejected' are the same text: no preference to learn; remove the row"
        )
    return Row(draft.prompt, draft.answers, draft.signs, place, form, draft.tools, draft.arguments)
