"""What scripts/gpu_day.py keeps: checks, what came of them, and the JSON file that a later call goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.files import replace_file

PASSED, FAILED, NOT_RUN, LEFT_OUT = "passed", "FAILED", "not run", "left out"


@dataclass(frozen=True)
class Finding:
    """A figure beside what was expected of it; `passed` is None where it could not be had, and `measured` says why."""

    what: str
    measured: str
    expected: str = ""
    passed: bool | None = None


def at_most(what: str, value: float, limit: float, why: str, unit: str = "") -> Finding:
    """Expect a figure of at most `limit`; NaN is above every limit."""
    return Finding(what, f"{value:.3g}{unit}", f"at most {limit:.3g}{unit}: {why}", bool(value <= limit))


def between(what: str, value: float, low: float, high: float, why: str) -> Finding:
    """Expect a figure from `low` to `high`; NaN is in no range."""
    return Finding(what, f"{value:.3f}", f"{low:g} to {high:g}: {why}", bool(low <= value <= high))


def same(what: str, equal: bool, difference: float = math.nan) -> Finding:
    """Expect two ways to come to the same bits."""
    far = "" if math.isnan(difference) else f", by up to {difference:.3g}"
    return Finding(what, "bit-equal" if equal else f"they differ{far}", "bit-equal", equal)


@dataclass(frozen=True)
class Check:
    """One thing to find out.

    Attributes:
        run: returns the findings; raises NotRun where it cannot be done here.
        seconds: what it takes on an H200, about; it is left out where less is left.
        cuda: whether it has no counterpart on a CPU.
        alone: whether it has a process of its own on a GPU: for what a process sets once, and for a clean allocator.
    """

    name: str
    run: Callable[[Any], Sequence[Finding]]
    seconds: float
    cuda: bool = False
    alone: bool = False


@dataclass
class Record:
    """The file: of which machine it is, what came of each check, and which one is running since when."""

    path: Path
    machine: dict[str, str]
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path, machine: dict[str, str]) -> Record:
        """Read the file, or begin one. Raises UserError where it is of another machine, or cannot be read."""
        record = cls(path, machine)
        if not path.exists():
            return record
        record.read()
        if record.machine != machine:
            changed = [name for name in machine if record.machine.get(name) != machine[name]]
            was, now = ({name: of.get(name) for name in changed} for of in (record.machine, machine))
            raise UserError(f"--json {path}: it was made with {was}, and here is {now}; name another file")
        return record

    def read(self) -> None:
        """Take what the file says now, which another process may have written."""
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.machine, self.checks, self.running = found["machine"], found["checks"], found["running"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--json {self.path}: cannot be read ({error!r}); name another file") from None

    def begin(self, key: str) -> None:
        """Note that a check is running."""
        self.running = {"check": key, "since": time.time()}
        self.write()

    def end(self, key: str, status: str, findings: Sequence[Finding] = (), reason: str = "") -> None:
        """Note what came of a check."""
        since = self.running["since"] if self.running and self.running["check"] == key else time.time()
        self.checks[key] = {
            "status": status,
            "reason": reason,
            "seconds": round(time.time() - since, 1),
            "findings": [asdict(finding) for finding in findings],
        }
        self.running = None
        self.write()

    def forget(self, keys: Sequence[str], statuses: Sequence[str]) -> None:
        """Forget what came of these checks, where it is one of `statuses`."""
        for key in keys:
            if self.checks.get(key, {}).get("status") in statuses:
                del self.checks[key]
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        content = {"machine": self.machine, "running": self.running, "checks": self.checks}
        replace_file(self.path, json.dumps(content, indent=1) + "\n")


def status_of(findings: Sequence[Finding]) -> str:
    """Return what findings come to: failed by one, passed by one where none failed."""
    verdicts = [finding.passed for finding in findings]
    return FAILED if False in verdicts else PASSED if True in verdicts else NOT_RUN


def table(record: Record, keys: Sequence[str]) -> str:
    """Return a line for each finding of these checks: what, measured, expected, verdict."""
    rows: list[tuple[str, str, str, str]] = []
    for key in keys:
        found = record.checks.get(key)
        if found is None:
            continue
        for finding in found["findings"]:
            verdict = {True: PASSED, False: FAILED, None: NOT_RUN}[finding["passed"]]
            rows.append((f"{key}: {finding['what']}", verdict, finding["measured"], finding["expected"]))
        if not found["findings"] or found["reason"]:
            rows.append((key, found["status"], found["reason"], ""))
    heading = ("check", "verdict", "measured", "expected")
    widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
                     for row in [heading, *rows])  # fmt: skip
