"""Numbers of the file formats, so that a version that is too old for a file says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError

KEY = "format"  # in the file; one without it is of format 1
RUN = 2  # config.yaml, progress.json and report.json; from 2 on a checkpoint holds adapters/NAME
HEAD = 1  # head.json and head.safetensors of an adapter
CACHE = 1  # a file of the reference's log-probs


def check_format(content: Mapping[str, Any], known: int, place: str | Path) -> None:
    """Raise UserError where `content` was written in a later format than this version knows.

    Args:
        content: of the file, by name.
        known: the latest format of such a file, `RUN` or `CACHE`.
        place: what the message names: a run's folder, or a file.
    """
    found = content.get(KEY, 1)
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{place}: format {found!r} is not a number of a format; this lite-dil writes {known}")
    if found > known:
        raise UserError(
            f"{place} was made by a newer lite-dil (format {found}; this one knows up to {known}); pip install -U lite-dil"
        )
