"""JSON objects in files, and objects and rows that carry a digest of themselves, so that damage is seen when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError, first_line
from lite_dil.base.hashing import sha256
from lite_dil.base.strict_json import parse_json

DIGEST = "digest"


def read_object(path: Path, where: str = "", digest: bool = False) -> dict[str, Any]:
    """Return the JSON object that a file holds; with `digest` it is without it.

    Args:
        where: how the message begins; by default with the path.
        digest: compare it with its digest, as `without_digest` does.

    Raises UserError if the file cannot be read, is no strict JSON, holds something else, or is not what was written.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        return without_digest(content) if digest else content
    except (OSError, ValueError) as error:
        raise UserError(f"{where or f'{path}:'} cannot be read ({first_line(error)})") from None


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its digest in "digest"."""
    return {**content, DIGEST: digest_of(content)}


def without_digest(content: Any) -> dict[str, Any]:
    """Return a JSON object that was read, without its digest; one of an older version, which has none, as it is.

    Raises ValueError if it is no object, or not what was written.
    """
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    found = {name: value for name, value in content.items() if name != DIGEST}
    if DIGEST in content and content[DIGEST] != digest_of(found):
        raise ValueError("it is not what was written")
    return found


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the digest of a JSON object, the same in any order of its keys."""
    return sha256([json.dumps(content, sort_keys=True).encode()])


def with_mark(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a row whose text in field `name` is followed by a mark of the whole row, 8 hexadecimal digits."""
    return {**row, name: f"{row[name]}-{_mark(row)}"}


def mark_of(row: Mapping[str, Any], name: str) -> tuple[str, bool]:
    """Return the text in field `name` without its mark, and whether the row is as it was written.

    A text without a mark, of an older version, is taken as it is. Raises KeyError without the field, TypeError for no text.
    """
    if not isinstance(row[name], str):
        raise TypeError(f"{name} is not a text")
    text, dash, mark = row[name].partition("-")
    return text, not dash or mark == _mark({**row, name: text})


def _mark(row: Mapping[str, Any]) -> str:
    return digest_of(row)[:8]
