"""One line of the table of proofs."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path


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


def kept(rows: Sequence[Row], short: bool) -> str:
    """The rows of a part as JSON, with the day, the machine and the form."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    about = {"date": date.today().isoformat(), "machine": machine, "form": "short" if short else "long"}
    return json.dumps(about | {"rows": [vars(row) for row in rows]}, indent=1)


_HEAD = """# Reliability

What became of lite-dil when it was broken on purpose. `make soak` makes this page; `scripts/soak` says how each part works.

- **writes**: a layer below the process kills it at a write, cuts the power (what was not synced is lost, torn or zeroed), or
  lets the disk fail; then the same command is started again. *Equal* is the result of an uninterrupted run, to the bit.
- **damage**: each file that lite-dil reads back is flipped, cut, emptied, zeroed, deleted or exchanged with another run's.
- **hostile**: rows, templates, models, adapters, run folders and names that hypothesis draws. A failure would be a traceback,
  something executed or written outside, a control character printed, or more than 10 s.
- **steady**: long runs and large data.
"""


def page(files: Iterable[Path]) -> str:
    """A page of the parts kept in these files; those that were not run are named."""
    parts = [_HEAD]
    for file in files:
        if not file.exists():
            parts.append(f"## {file.stem}\n\nNot run.\n")
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [Row(**row | {"outcomes": Counter(row["outcomes"])}) for row in content["rows"]]
        seconds = sum(row.seconds for row in rows)
        parts.append(f"## {file.stem}\n\n{content['date']}, {content['form']} form, {content['machine']}, {seconds:.0f} s.\n")
        parts.append(table(rows) + "\n")
    return "\n".join(parts)
