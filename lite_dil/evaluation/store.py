"""What a model answered in evaluations, on disk: computed once for all adapters, tasks, pairs and runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lite_dil.backends.types import Generated
from lite_dil.base.checked import mark_of, with_mark
from lite_dil.base.formats import EVALUATION, KEY, check_format
from lite_dil.base.hashing import digest
from lite_dil.base.jsonl import JSONLines
from lite_dil.base.strict_json import parse_json

# A text that was generated; a log-likelihood in nats, and whether greedy decoding would give the continuation; or a response.
Result = str | tuple[float, bool] | Generated


class ResultStore:
    """Results of one model, in an append-only file. A request's key has all that decides its result besides the model.

    A line that is damaged is ignored, and computed again.

    Args:
        folder: holds a file per model; None keeps everything in memory.
        model: what tells this model from others: weights, adapter, strength, how it computes.

    Attributes:
        found: results that were known before this process.
        damaged: lines that were ignored.
    """

    def __init__(self, folder: Path | None, model: Mapping[str, Any]) -> None:
        self.known: dict[str, Result] = {}
        self.damaged = 0
        self._file: JSONLines | None = None
        if folder is not None:
            path = folder / f"{digest(EVALUATION, sorted(model.items()))}.jsonl"
            self._file = JSONLines(path, "the results of evaluations")
            self._read(self._file, path)
            if not self._file.size:
                self._file.add({KEY: EVALUATION, **model})
        self.found = len(self.known)

    def _read(self, file: JSONLines, path: Path) -> None:
        for number, line in enumerate(file.lines):
            try:
                row = parse_json(line)
                if number == 0 and KEY in row:
                    check_format(row, EVALUATION, path)
                    continue
                key, whole = mark_of(row, "key")
                result = _result(row["value"])
            except (ValueError, KeyError, TypeError, IndexError):  # not JSON, or not one of our rows
                whole = False
            if whole:
                self.known.setdefault(key, result)
            else:
                self.damaged += 1

    def add(self, results: Mapping[str, Result]) -> None:
        """Keep results; they are on disk on return. Raises DiskFailed, and ValueError for one that is not finite."""
        if not all(isinstance(value, str | Generated) or math.isfinite(value[0]) for value in results.values()):
            raise ValueError("a log-likelihood is not finite")
        new = {key: value for key, value in results.items() if key not in self.known}
        self.known |= new
        if self._file and new:
            rows = ({"value": value if isinstance(value, str) else list(value), "key": key} for key, value in new.items())
            self._file.add(*(with_mark(row, "key") for row in rows))


def _result(value: Any) -> Result:
    """Return a result from what JSON made of it. Raises TypeError, ValueError or IndexError if it is none."""
    if isinstance(value, str):
        return value
    first, second = value
    if isinstance(first, list):
        return Generated([int(token) for token in first], None if second is None else int(second))
    return float(first), bool(second)
