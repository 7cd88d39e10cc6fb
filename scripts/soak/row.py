"""One line of the table of proofs, and the page that it stands on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """A kind of case: how many were tried, what became of them, and which failed.

    `outcomes` counts the cases by what happened ("equal", "refused", "from the checkpoint before"); `failures` has a line
    for each case that lost something, ended in a traceback, or ran too long. `of` is whose cases these are, where a part tries
    the same kinds with several commands or backends. `seconds` are of CPU.
    """

    part: str
    what: str
    outcomes: Counter[str]
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    of: str = ""

    @property
    def ok(self) -> bool:
        return not self.failures and self.outcomes.total() > 0


def joined(rows: Iterable[Row]) -> list[Row]:
    """Return one row for each kind, with the number of cases of each command or backend that it was tried with."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.part, row.what), []).append(row)
    found = []
    for (part, what), some in kinds.items():
        outcomes = sum((row.outcomes for row in some), Counter[str]())
        failures = [f"{row.of}: {text}" if row.of else text for row in some for text in row.failures]
        counts = "; ".join(f"{row.of} {row.outcomes.total()}" for row in some if row.of)
        name = f"{what}: {counts}" if counts else what
        found.append(Row(part, name, outcomes, failures, sum(row.seconds for row in some)))
    return found


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, those of a kind in one."""
    lines = ["| part | what | cases | outcomes | failed |", "|---|---|---|---|---|"]
    for row in joined(rows):
        outcomes = ", ".join(f"{what} {count}" for what, count in row.outcomes.most_common())
        lines.append(f"| {row.part} | {row.what} | {row.outcomes.total():,} | {outcomes} | {len(row.failures)} |")
    return "\n".join(lines)


_HEAD = """# Reliability

What became of lite-dil when it was broken on purpose. `make soak` makes this page, CI runs `make soak-short`, a few of each
kind, and `scripts/soak` says how each part works.

- **writes**: a layer below the process kills it at a write, cuts the power (what was not synced is lost, torn or zeroed), or
  lets the disk fail; then the same command is started again. *Equal* is the result of an uninterrupted run, to the bit.
- **damage**: each file that lite-dil reads back is flipped, cut, emptied, zeroed, deleted or exchanged with another run's.
- **hostile**: rows, templates, models, adapters, run folders and names that hypothesis draws. A failure would be a traceback,
  something executed or written outside, a control character printed, or more than 10 s.
- **steady**: long runs and large data.
"""


def page(parts: dict[str, list[dict[str, Any]]]) -> str:
    """A page of the pieces of each part, as `pieces.Kept` has them; a part without any is named."""
    everything = [piece for pieces in parts.values() for piece in pieces]
    text = [_HEAD]
    if everything:
        text.append(_span("All parts", everything) + "\n")
    for part, pieces in parts.items():
        if pieces:
            text.append(f"## {part}\n\n{_span('This part', pieces)}\n\n{table(rows_of(pieces))}\n")
        else:
            text.append(f"## {part}\n\nNot run.\n")
    return "\n".join(text)


def rows_of(pieces: Iterable[dict[str, Any]]) -> list[Row]:
    """Return the rows of pieces."""
    return [Row(**row | {"outcomes": Counter(row["outcomes"])}) for piece in pieces for row in piece["rows"]]


def _span(what: str, pieces: Sequence[dict[str, Any]]) -> str:
    """Return when, where and of which code pieces were run, and how long their cases took."""
    form, commit, machine = (", ".join(sorted({piece[name] for piece in pieces})) for name in ("form", "commit", "machine"))
    rows = rows_of(pieces)
    cases, failed = sum(row.outcomes.total() for row in rows), sum(len(row.failures) for row in rows)
    cpu = sum(row.seconds for row in rows) / 60
    first, last = min(piece["began"] for piece in pieces), max(piece["ended"] for piece in pieces)
    return (
        f"{what}: {first} to {last}, the {form} form at {commit}, {machine}. {cases:,} cases took {cpu:.0f} minutes of CPU; "
        f"{failed} failed."
    )


def as_json(row: Row) -> dict[str, Any]:
    """Return a row as JSON has it."""
    return json.loads(json.dumps(vars(row)))  # type: ignore[no-any-return]


def write_page(path: Path, parts: dict[str, list[dict[str, Any]]]) -> None:
    """Write the page."""
    path.write_text(page(parts), encoding="utf-8")
