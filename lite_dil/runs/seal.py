"""A folder's seal: digests of its files and the options of its run, so that damage is seen before a file is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lite_dil.base import checked
from lite_dil.base.checked import with_digest, without_digest
from lite_dil.base.files import write
from lite_dil.base.formats import KEY, SEAL
from lite_dil.base.hashing import file_pieces, sha256
from lite_dil.base.strict_json import parse_json

DIGESTS = "digests.json"


class Damaged(Exception):
    """A sealed folder is not what was written; the text names the file."""


def seal(folder: Path, options: Mapping[str, Any]) -> None:
    """Write digests.json, with a digest of every file in the folder and of itself; not of texts for people (*.md)."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    content = {"options": dict(options), "files": {name: _of(folder / name) for name in names}}
    write(folder / DIGESTS, json.dumps({KEY: SEAL, **with_digest(content)}, indent=1, sort_keys=True) + "\n")


def unsealed(folder: Path, part: str = "") -> dict[str, Any] | None:
    """Return the options of the run that sealed the folder, or None if it has no seal, after reading all of its files.

    With a `part`, a folder in it, only the files there are compared.

    Raises Damaged if the seal or one of the files is not as it was written.
    """
    content = _content(folder)
    if content is None:
        return None
    for name, value in content["files"].items():
        if not name.startswith(part):
            continue
        try:
            found = _of(folder / name)
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None
        if found != value:
            raise Damaged(f"{name} is not what was written")
    return dict(content["options"])


def recorded(folder: Path) -> dict[str, Any] | None:
    """Return what `unsealed` does, without reading the files again. Raises Damaged if the seal itself is not as written."""
    content = _content(folder)
    return None if content is None else dict(content["options"])


def _content(folder: Path) -> dict[str, Any] | None:
    if not (folder / DIGESTS).exists():
        return None
    try:
        found = parse_json((folder / DIGESTS).read_text(encoding="utf-8"))
        return without_digest({name: found[name] for name in ("options", "files", checked.DIGEST)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{DIGESTS}: {error if type(error) is ValueError else 'it cannot be read'}") from None


def _of(path: Path) -> str:
    return sha256(file_pieces(path))
