"""Rows of columnar data: Arrow gives every object of a column the keys of all others, null where a row has none."""

from __future__ import annotations

from typing import Any

_SCHEMAS = ("tools", "chat_template_kwargs")  # where a null means nothing else


def without_added(row: Any) -> Any:
    """Return a row without the nulls that Arrow added to its tools' schemas and its template arguments."""
    if not isinstance(row, dict):
        return row
    return {name: _without_nulls(value) if name in _SCHEMAS else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
