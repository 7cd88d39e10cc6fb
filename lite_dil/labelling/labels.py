"""The file of labels: preference pairs ready for training, and next to it the answers labelled bad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lite_dil.base.errors import UserError
from lite_dil.base.jsonl import JSONLines
from lite_dil.base.strict_json import parse_json
from lite_dil.data.files import RowError
from lite_dil.data.formats import read
from lite_dil.data.messages import Completion, Message
from lite_dil.data.prompts import Prompt, key_of
from lite_dil.data.reader import same_text


@dataclass(frozen=True)
class Candidate:
    """An answer to choose from: its text, its origin ("base", "tuned-...", "typed"), and whether it was cut short.

    `message` is the whole message, if it holds more than text, such as reasoning.
    """

    text: str
    origin: str
    cut: bool = False
    message: Message | None = None

    @property
    def answer(self) -> Completion:
        """What is trained on."""
        return self.message or self.text


class Mark(NamedTuple):
    """The state of both files before a decision: sizes in bytes, and rows."""

    sizes: tuple[int, int]
    rows: tuple[int, int]


class Labels:
    """Pairs in one JSON Lines file, and bad answers without a better one in a second, ``labels.bad.jsonl`` for labels.jsonl.

    Each decision is on disk when its method returns. Besides the training fields, a row has the origins of its answers in
    'from'; 'earlier' marks pairs whose rejected answer was labelled bad before, not shown next to the chosen one.

    Attributes:
        rows: number of pairs, including those from before.
        bad_rows: number of bad answers, likewise.

    Raises UserError if the files hold other rows.
    """

    def __init__(self, path: Path) -> None:
        self.pairs = JSONLines(path, "labels", alone=True)
        self.bad = JSONLines(path.with_name(f"{path.stem}.bad{path.suffix}"), "bad answers", alone=True)
        self.rows = _rows(self.pairs, "preference")
        self.bad_rows = _rows(self.bad, "unpaired")
        self._index()

    def check_kind(self, chat: bool) -> None:
        """Raise UserError if the files hold prompts of the other kind, which cannot be trained on together."""
        for file, rows in ((self.pairs, self.rows), (self.bad, self.bad_rows)):
            if rows and isinstance(rows[0]["prompt"], str) == chat:
                kinds = ("plain text", "chat messages")
                raise UserError(
                    f"{file.path}: its prompts are {kinds[not chat]}, and those to label are {kinds[chat]}; keep one "
                    "kind in a file: give another --output, or --chat"
                )

    def is_done(self, prompt: Prompt) -> bool:
        """Return whether an answer to it was chosen."""
        return prompt.key in self._done

    def bad_of(self, prompt: Prompt) -> list[Candidate]:
        """Return its answers labelled bad."""
        return self._bad_of.get(prompt.key, [])

    def mark(self) -> Mark:
        """Return the state that `undo` restores."""
        return Mark((self.pairs.size, self.bad.size), (len(self.rows), len(self.bad_rows)))

    def take(self, prompt: Prompt, winner: Candidate, shown: Sequence[Candidate]) -> int:
        """Add the pairs of `winner` against the other answers shown and those labelled bad; return how many."""
        new, seen = [], {same_text(winner.text)}
        for loser, earlier in [*((each, False) for each in shown), *((each, True) for each in self.bad_of(prompt))]:
            if same_text(loser.text) in seen:
                continue
            seen.add(same_text(loser.text))
            row = prompt.row(chosen=winner.answer, rejected=loser.answer)
            row["from"] = {"chosen": winner.origin, "rejected": loser.origin}
            new.append({**row, "earlier": True} if earlier else row)
        self.pairs.add(*new)
        self.rows += new
        self._index()
        return len(new)

    def reject(self, prompt: Prompt, shown: Sequence[Candidate]) -> None:
        """Add answers of which none is good."""
        new = [{**prompt.row(completion=each.answer), "label": False, "from": each.origin} for each in shown]
        self.bad.add(*new)
        self.bad_rows += new
        self._index()

    def undo(self, mark: Mark) -> None:
        """Undo everything since `mark`."""
        for file, size in zip((self.pairs, self.bad), mark.sizes, strict=True):
            file.cut(size)
        del self.rows[mark.rows[0] :], self.bad_rows[mark.rows[1] :]
        self._index()

    def wins(self, one: str, other: str) -> tuple[int, int]:
        """Return how often an answer of `one` was preferred to one of `other` shown with it, and how often they met."""
        met = [row["from"] for row in self.rows if isinstance(row.get("from"), dict) and not row.get("earlier")]
        won = sum(sides == {"chosen": one, "rejected": other} for sides in met)
        return won, won + sum(sides == {"chosen": other, "rejected": one} for sides in met)

    def _index(self) -> None:
        self._done = {key_of(row) for row in self.rows}
        self._bad_of: dict[str, list[Candidate]] = {}
        for row in self.bad_rows:
            (answer,) = read(row, "unpaired").answers
            message = answer if isinstance(answer, dict) else None
            text = str(answer["content"]) if isinstance(answer, dict) else answer
            found = Candidate(text, str(row.get("from", "")), message=message)
            self._bad_of.setdefault(key_of(row), []).append(found)


def _rows(file: JSONLines, format: str) -> list[dict[str, Any]]:
    """Return the rows of a file, each checked as training would check it."""
    rows = []
    for number, line in enumerate(file.lines, 1):
        try:
            rows.append(parse_json(line))
            read(rows[-1], format)
            if "prompt" not in rows[-1]:  # which training would find in what both answers begin with
                raise RowError("no prompt", "no prompt of its own")
        except (ValueError, RecursionError) as error:  # not JSON, or a RowError
            raise UserError(f"{file.path} line {number}: {error}; fix the line, remove it, or give another --output") from None
    return rows
