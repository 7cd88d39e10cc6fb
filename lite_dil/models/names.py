"""Model names fit for publishing: hub ids as they are, and only the last part of a local path."""

from __future__ import annotations

import re
from pathlib import Path

from lite_dil.base.text import one_line
from lite_dil.models.find import EMBEDDED_MODEL

HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form owner/name and is not a local folder."""
    return re.fullmatch(HUB_ID, name, re.ASCII) is not None and ".." not in name and not _is_here(name)


def public_name(name: str) -> str:
    """Return a hub id or the embedded model's name unchanged, and the last part of a path."""
    if name == EMBEDDED_MODEL or is_hub_id(name):
        return name
    last = last_part(name)
    return last if last.strip(".") else last_part(str(Path(name).resolve()))  # for "." and "..", the folder's name


def last_part(path: str) -> str:
    """Return the last part of a path in any system's notation."""
    return one_line(re.split(r"[/\\]", path.rstrip("/\\"))[-1])


def _is_here(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # too long for a name
        return False
