"""A run's metrics.jsonl by column, and curves of it whose size does not grow with the run."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.base.hashing import sha256
from lite_dil.runs.folder import RunFolder
from lite_dil.runs.metrics_lines import parse_line, parse_lines
from lite_dil.runs.progress import read_progress
from lite_dil.runs.seal import Damaged, unsealed

POINTS = 240  # maximum points of a curve, more than the pixels of its chart on a phone


class Curve(NamedTuple):
    """Values by optimiser step, NaN where there was no finite one; each is the mean of `bin` lines."""

    steps: np.ndarray
    values: np.ndarray
    bin: int = 1

    @property
    def drawable(self) -> bool:
        """Whether any value is finite."""
        return bool(np.isfinite(self.values).any())


class MetricColumns:
    """The lines of one kind, about 8 bytes per figure, in the order of the file."""

    def __init__(self) -> None:
        self.number = 0
        self._columns: dict[str, array[float]] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Add a line; null stands for a figure that was not finite."""
        for name, value in line.items():
            column = self._columns.get(name)
            if column is None:
                column = self._columns[name] = array("d")
            if len(column) < self.number:
                column.extend([math.nan] * (self.number - len(column)))
            column.append(math.nan if value is None else value)
        self.number += 1

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def get(self, name: str) -> np.ndarray:
        """Return a column, (lines,) float64, NaN for lines that lack it."""
        column = np.array(self._columns.get(name, ()), np.float64)
        return np.concatenate([column, np.full(self.number - len(column), math.nan)])

    def last(self, name: str) -> float | None:
        """Return the last line's figure, or None if it is missing or not finite."""
        return self.at(-1, name) if self.number else None

    def at(self, line: int, name: str) -> float | None:
        """Return one line's figure, or None."""
        value = float(self.get(name)[line])
        return value if math.isfinite(value) else None

    def recent(self, name: str, by: str | None = None) -> float | None:
        """Return the mean over the last quarter of the lines, at least one, since a single step's figures are noisy.

        Args:
            by: the figure to weight lines by, such as seconds if `name` is a rate; None for equal weights.
        """
        last = max(1, self.number // 4)
        values, weights = self.get(name)[-last:], np.ones(last) if by is None else self.get(by)[-last:]
        finite = np.isfinite(values * weights)
        return float(np.average(values[finite], weights=weights[finite])) if finite.any() else None

    def curve(self, name: str) -> Curve:
        """Return a column by step; with more than `POINTS` lines, means over consecutive lines."""
        steps, values = self.get("step"), self.get(name)
        size = -(-self.number // POINTS)
        if size <= 1:
            return Curve(steps, values)
        starts = np.arange(0, self.number, size)
        finite = np.isfinite(values)
        counts = np.add.reduceat(finite, starts, dtype=np.int64)
        sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
        ends = np.minimum(starts + size, self.number) - 1
        return Curve(steps[ends], np.divide(sums, counts, where=counts > 0, out=np.full(len(starts), math.nan)), size)


class History:
    """The training lines and the evaluations of a run."""

    def __init__(self) -> None:
        self.train, self.held_out = MetricColumns(), MetricColumns()

    def add(self, line: dict[str, Any]) -> None:
        """Add a line of training or of an evaluation."""
        (self.held_out if "eval_loss" in line else self.train).add(line)

    @property
    def step(self) -> int:
        """The last logged step."""
        return int(max((columns.last("step") or 0 for columns in (self.train, self.held_out)), default=0))

    @property
    def seconds(self) -> float:
        """Total time of the steps, without evaluations and saving."""
        steps = np.diff(self.train.get("step"), prepend=0.0)
        return float(np.nansum(steps * self.train.get("seconds_per_step")))


def read_history(path: Path) -> History:
    """Read metrics.jsonl, without an incomplete last line, which a killed run may leave."""
    return _history(path.read_bytes() if path.exists() else b"")[0]


def metrics_of(folder: Path) -> bytes | None:
    """Return the content of a run's metrics.jsonl, or None if it has no such file."""
    path = RunFolder(folder).metrics
    return path.read_bytes() if path.exists() else None


def checked_history(folder: Path, metrics: bytes | None, noted: Any = None) -> tuple[History, str]:
    """Return the good lines of metrics, a result of `metrics_of`, and what is wrong with them as `wrong_metrics` does."""
    history, bad = _history(metrics or b"")
    return history, _wrong(folder, metrics, bad, noted)


def size_and_hash(metrics: bytes | None) -> list[Any]:
    """Return the size and the hash of metrics, a result of `metrics_of`, for `wrong_metrics`."""
    return [len(metrics or b""), sha256([metrics or b""])]


def wrong_metrics(folder: Path, noted: Any = None) -> str:
    """Return what is wrong with a run's metrics.jsonl, as far as a hash of it was noted; "" if nothing is.

    Its newest checkpoint has one. `noted`, a result of `size_and_hash` in report.json, is of the evaluations after it too.
    """
    metrics = metrics_of(folder)
    return _wrong(folder, metrics, parse_lines(metrics or b"")[1], noted)


def read_metrics(folder: Path, noted: Any = None) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; none if it has no such file. `noted` is that of `wrong_metrics`.

    Raises UserError if they are not what the run wrote.
    """
    metrics = metrics_of(folder)
    lines, bad = parse_lines(metrics or b"")
    if wrong := _wrong(folder, metrics, bad, noted):
        raise UserError(wrong)
    return lines


def _history(content: bytes) -> tuple[History, int]:
    """Return the good lines, and the number of damaged ones, of which a last line that was cut off is none."""
    history, bad, (*texts, last) = History(), 0, content.split(b"\n")
    for text in texts:
        if (line := parse_line(text)) is None:
            bad += 1
        else:
            history.add(line)
    if (line := parse_line(last)) is not None:
        history.add(line)
    return history, bad


def _wrong(folder: Path, content: bytes | None, bad: int, noted: Any) -> str:
    """Return what is wrong with the content of a metrics.jsonl, or None for no such file, of which `bad` lines are damaged."""
    run = RunFolder(folder)
    known = [noted] if isinstance(noted, list) and len(noted) == 2 else []
    if (checkpoint := run.latest()) is not None:
        try:
            unsealed(checkpoint, "progress.json")
            known += [progress] if (progress := read_progress(checkpoint).metrics) else []
        except (Damaged, UserError) as error:
            return f"{checkpoint} is damaged: {error}"
    if not known:  # of an older version
        return ""
    if content is None:
        return f"{run.metrics} is missing" if any(size for size, _ in known) else ""
    other = any(sha256([content[:size]]) != value for size, value in known)
    return f"{run.metrics} is not what the run wrote" if other or bad else ""
