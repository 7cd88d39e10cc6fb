"""Rows that a program passes instead of a file name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.data.arrow import without_added
from lite_dil.data.files import PlacedRow

DATA = "data"  # their name in messages
_NAME = re.compile(r"rows-[0-9a-f]{16}")


class Rows:
    """Rows as dicts from an iterable, which is read only once, so that a generator works."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows, self._taken = rows, False

    def records(self) -> Iterator[PlacedRow]:
        """Yield the rows with their places. Raises UserError if a generator was read before."""
        if self._taken and iter(self._rows) is self._rows:
            raise UserError("these rows came from an iterator that was already read; pass a new one, or a list")
        self._taken = True
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
