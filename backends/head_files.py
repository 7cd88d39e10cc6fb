"""The files of an adapter's head, the same on every backend: its weights, and a JSON file that describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from lite_dil.backends.types import Head
from lite_dil.base.errors import UserError
from lite_dil.base.files import write
from lite_dil.base.formats import HEAD, KEY, check_format
from lite_dil.base.strict_json import parse_json

HEAD_WEIGHTS, HEAD_CONFIG = "head.safetensors", "head.json"


class HeadModule(Protocol):
    """A head of either backend: its specification, and the width of the hidden states that it reads."""

    spec: Head
    width: int


def has_head(folder: Path) -> bool:
    """Return whether a folder holds a saved head."""
    return (folder / HEAD_CONFIG).is_file()


def read_head(folder: Path) -> Head | None:
    """Return the saved head's description; None if there is none. Raises UserError if it cannot be read."""
    if not has_head(folder):
        return None
    saved = _read(folder)
    try:
        return Head(saved["outputs"], saved["at"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / HEAD_CONFIG} does not describe a head ({error})") from None


def write_config(folder: Path, head: HeadModule) -> None:
    """Write a head's description, next to its weights."""
    write(folder / HEAD_CONFIG, json.dumps({KEY: HEAD, **_described(head)}, indent=2) + "\n")


def check_config(folder: Path, head: HeadModule | None) -> None:
    """Raise UserError unless the same head, or none if `head` is None, was saved there."""
    if head is None or not has_head(folder):
        if has_head(folder):
            raise UserError(f"{folder} was saved with a head; this adapter has none")
        if head is not None:
            raise UserError(f"{folder} was saved without a head; this adapter has one")
        return
    saved = _read(folder)
    if not all(saved.get(name) == value for name, value in _described(head).items()):
        raise UserError(f"{folder}: its head is {saved}; this adapter's is {_described(head)}")


def _read(folder: Path) -> dict[str, Any]:
    try:
        saved = parse_json((folder / HEAD_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / HEAD_CONFIG} cannot be read ({error})") from None
    if not isinstance(saved, dict):
        raise UserError(f"{folder / HEAD_CONFIG} cannot be read (expected an object)")
    check_format(saved, HEAD, f"the head in {folder}")
    return saved


def _described(head: HeadModule) -> dict[str, object]:
    return {"outputs": head.spec.outputs, "at": head.spec.at, "width": head.width}
