"""Text as it may stand in HTML, and a few facts as HTML, for notebooks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from lite_dil.base.redaction import redacted
from lite_dil.base.text import printable


def clean(value: object) -> str:
    """Return anything as text that a page may hold and a person can read, before escaping."""
    return printable(str(value).replace("\r\n", "\n"))


def text(value: object) -> str:
    """Return anything as text that is safe in HTML, in an attribute too, and holds no secret."""
    return escape(redacted(clean(value)), quote=True)


def facts(title: str, rows: Mapping[str, object]) -> str:
    """Return a title and a table of names and values as HTML; values that are `Link` are links, all else is escaped."""
    lines = "".join(
        f'<tr><th style="text-align: left">{text(name)}</th><td style="text-align: left">{_value(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<div><b>{text(title)}</b><table>{lines}</table></div>"


class Link:
    """A file to look at: a link where a notebook can follow it, which is below its own folder, else the path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)


def _value(value: object) -> str:
    if isinstance(value, Link):
        try:
            below = value.path.resolve().relative_to(Path.cwd().resolve())
        except ValueError:
            return text(value)
        return f'<a href="{quote(below.as_posix())}" target="_blank">{text(os.fspath(value.path))}</a>'
    return text(value)
