"""One line of the table of proofs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A kind of case: how many were tried, what became of them, and which failed.

    `outcomes` counts the cases by what happened ("equal", "refused", "from the checkpoint before"); `failures` has a line
    for each case that lost something, ended in a traceback, or ran too long.
    """

    part: str
    what: str
    outcomes: Counter[str]
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.failures and self.outcomes.total() > 0


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| part | what | cases | outcomes | failed |", "|---|---|---|---|---|"]
    for row in rows:
        outcomes = ", ".join(f"{what} {count}" for what, count in row.outcomes.most_common())
        lines.append(f"| {row.part} | {row.what} | {row.outcomes.total()} | {outcomes} | {len(row.failures)} |")
    return "\n".join(lines)
