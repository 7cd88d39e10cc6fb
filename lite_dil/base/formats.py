"""Version numbers of the file formats, so that a lite-dil too old for a file says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError

KEY = "format"  # the key in the file; without it the format is 1
RUN = 3  # config.yaml, progress.json and report.json; since 2 a checkpoint holds adapters/NAME, since 3 it is sealed
SEAL = 1  # digests.json
HEAD = 1  # head.json and head.safetensors of an adapter
REWARD = 1  # reward.json of a reward model
CACHE = 1  # a file of reference log-probs
STORE = 1  # a file of a data set's tokens
EVALUATION = 1  # a file of a model's answers to benchmarks; eval.json


class NewerFormat(UserError):
    """A file was made by a newer version."""


def check_format(content: Mapping[str, Any], known: int, place: str | Path) -> None:
    """Raise NewerFormat if `content` has a later format than this version knows, UserError if it has none.

    Args:
        content: the file's fields.
        known: the latest known format of such a file: `RUN`, `HEAD`, `REWARD`, `CACHE`, `STORE` or `EVALUATION`.
        place: the run's folder or the file, for the message.
    """
    found = content.get(KEY, 1)
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{place}: format {found!r} is not a format number; this lite-dil writes {known}")
    if found > known:
        raise NewerFormat(
            f"{place} was made by a newer lite-dil (format {found}; this one knows up to {known}); update lite-dil"
        )
