"""The checks of scripts/gpu_day.py, their results, and the JSON file from which a later call continues."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.files import replace_file

PASSED, FAILED, NOT_RUN, LEFT_OUT = "ok", "FAILED", "not run", "left out"


@dataclass(frozen=True)
class Finding:
    """A figure and what was expected.

    Attributes:
        passed: None where the figure could not be had, and `measured` says why.
        value: the figure itself, for a check that compares with it.
    """

    what: str
    measured: str
    expected: str
    passed: bool | None = None
    value: float | None = None


def at_most(what: str, value: float, limit: float, why: str, unit: str = "", some: bool = False) -> Finding:
    """Expect a figure of at most `limit`; NaN is above every limit. With `some` 0 is wrong too: nothing was computed."""
    expected = f"{'above 0, ' * some}at most {limit:.3g}{unit}: {why}"
    return Finding(what, f"{value:.3g}{unit}", expected, bool(value <= limit and (value > 0 or not some)), value)


def between(what: str, value: float, low: float, high: float, why: str, unit: str = "") -> Finding:
    """Expect a figure from `low` to `high`; NaN is in no range."""
    return Finding(what, f"{value:.3f}{unit}", f"{low:.3g} to {high:.3g}{unit}: {why}", bool(low <= value <= high), value)


def same(what: str, equal: bool, difference: float = math.nan) -> Finding:
    """Expect two results to be bit-equal."""
    far = "" if math.isnan(difference) else f", by up to {difference:.3g}"
    return Finding(what, "bit-equal" if equal else f"they differ{far}", "bit-equal", equal)


@dataclass(frozen=True)
class Check:
    """A check, which runs in its own process.

    Attributes:
        run: returns or yields the findings; raises NotRun where it cannot be done here. What was yielded before its process
            ended, for whatever reason, is kept.
        seconds: what it takes on an H200 by itself: see gpu_day_costs.py. It is left out where less is left.
        cuda: whether it has no counterpart on a CPU.
        gib: of the card's memory that it takes at most, so that no more are started at a time than have room.
        models: whether it needs what the first check makes.
        first: it makes the models: it comes before the others, alone.
        there: of a `first` one, whether what it makes is still there.
    """

    name: str
    run: Callable[[Any], Iterable[Finding]]
    seconds: float
    cuda: bool = False
    gib: float = 8.0
    models: bool = True
    first: bool = False
    there: Callable[[Any], bool] | None = None


@dataclass
class Record:
    """The file of results: its machine, and each check's result. One process writes it, others may read it."""

    path: Path
    machine: dict[str, str]
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, machine: dict[str, str]) -> Record:
        """Read the file, or start one. Raises UserError if it is of another machine or cannot be read."""
        record = cls(path, machine)
        if not path.exists():
            return record
        record.read()
        if record.machine != machine:
            changed = [name for name in machine if record.machine.get(name) != machine[name]]
            was, now = ({name: of.get(name) for name in changed} for of in (record.machine, machine))
            raise UserError(f"--json {path}: it was made with {was}, and here is {now}; name another file")
        return record

    def read(self) -> Record:
        """Read the file again."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.machine, self.checks = found["machine"], found["checks"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--json {self.path}: cannot be read ({error!r}); name another file") from None
        return self

    def end(
        self,
        key: str,
        status: str,
        findings: Sequence[dict[str, Any]] = (),
        reason: str = "",
        seconds: float = 0.0,
        log: str = "",
    ) -> None:
        """Record a check's result and write it to disk at once; `log` is the end of what a failed one printed."""
        self.checks.pop(key, None)  # a repeated one comes last, as it was done last
        self.checks[key] = {
            "status": status,
            "reason": reason,
            "seconds": round(seconds, 1),
            "findings": list(findings),
            **({"log": log} if log else {}),
        }
        self.write()

    def forget(self, keys: Iterable[str], statuses: Sequence[str]) -> None:
        """Drop the results of these checks that have one of `statuses`."""
        for key in keys:
            if self.checks.get(key, {}).get("status") in statuses:
                del self.checks[key]
        self.write()

    def value(self, key: str, what: str) -> float | None:
        """Return the figure of a finding, or None."""
        found = (one["value"] for one in self.checks.get(key, {}).get("findings", ()) if one["what"] == what)
        return next(found, None)

    def write(self) -> None:
        """Write the file atomically."""
        replace_file(self.path, json.dumps({"machine": self.machine, "checks": self.checks}, indent=1) + "\n")


def status_of(verdicts: Sequence[bool | None]) -> str:
    """Return the status of findings: failed if one failed, passed if one passed and none failed."""
    return FAILED if False in verdicts else PASSED if True in verdicts else NOT_RUN


def table(record: Record, keys: Sequence[str]) -> str:
    """Return a line for each finding of these checks: what, measured, expected, verdict; then how many there are of each."""
    rows: list[tuple[str, str, str, str]] = []
    for key in keys:
        found = record.checks.get(key)
        if found is None:
            continue
        for finding in found["findings"]:
            verdict = {True: PASSED, False: FAILED, None: NOT_RUN}[finding["passed"]]
            rows.append((f"{key}: {finding['what']}", finding["measured"], finding["expected"], verdict))
        if not found["findings"] or found["reason"]:
            rows.append((key, found["reason"], "done" if found["status"] == FAILED else "-", found["status"]))
    heading = ("check", "measured", "expected", "verdict")
    lines = [" | ".join(row) for row in [heading, *rows]]
    counts = {status: [key for key in keys if record.checks.get(key, {}).get("status") == status] for status in STATUSES}
    lines += [f"{status}: {len(those)} checks" for status, those in counts.items() if those]
    lines += [f"  {key}" for status in (FAILED, LEFT_OUT) for key in counts[status]]
    return "\n".join(lines)


STATUSES = (PASSED, FAILED, NOT_RUN, LEFT_OUT)
