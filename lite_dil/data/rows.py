"""Rows that a program passes instead of a file name."""

from __future__ import annotations

import json
import marshal
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.hashing import sha256
from lite_dil.data.arrow import without_added
from lite_dil.data.files import PlacedRow

DATA = "data"  # their name in messages
_NAME = re.compile(r"rows-[0-9a-f]{16}")


class Rows:
    """Rows as dicts from an iterable, which is read only once, so that a generator works."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows, self._taken = rows, False

    def digest(self, least: int) -> str | None:
        """Return a hash of the rows; None if they can be read only once, are small, or hold anything but what JSON has.

        Args:
            least: the bytes of rows that are not small.
        """
        if iter(self._rows) is self._rows:
            return None
        size = 0

        def content() -> Iterator[bytes]:
            nonlocal size
            for _, row in self._placed():
                # JSON does not tell a tuple from a list; marshal does, and takes an array for its bytes. Version 2 gives equal
                # values equal bytes, whichever objects they share.
                json.dumps(row)
                yield (found := marshal.dumps(row, 2))
                size += len(found)

        try:
            found = sha256(content())
        except (TypeError, ValueError):
            return None
        return found if size >= least else None

    def records(self) -> Iterator[PlacedRow]:
        """Yield the rows with their places. Raises UserError if a generator was read before."""
        if self._taken and iter(self._rows) is self._rows:
            raise UserError("these rows came from an iterator that was already read; pass a new one, or a list")
        self._taken = True
        return self._placed()

    def _placed(self) -> Iterator[PlacedRow]:
        columnar = hasattr(self._rows, "features")  # a data set of the datasets package
        for number, row in enumerate(self._rows, 1):
            value = dict(row) if hasattr(row, "keys") else row
            yield f"{DATA} row {number}", without_added(value) if columnar else value


def rows_name(fingerprint: str) -> str:
    """Return the name of a program's rows in a run's files, made from their content."""
    return f"rows-{fingerprint}"


def is_rows_name(source: str) -> bool:
    """Return whether `source` is a result of `rows_name`."""
    return _NAME.fullmatch(source) is not None
