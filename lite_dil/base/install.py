"""How to install what lite-dil needs for an option: one form of the command, which works for this installation.

lite-dil is on no package index, where a stranger could register its name: a command names the place it came from instead.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from lite_dil.base.shell import quote


def install(extra: str) -> str:
    """Return the command that installs an extra of lite-dil, for a shell."""
    origin = _origin()
    if place := _place(origin):
        return f"pip install {quote(f'lite-dil[{extra}] @ {place}')}"
    folder = _folder(origin)
    editable = "" if folder and not origin["dir_info"].get("editable") else "-e "
    if folder is None or folder == Path.cwd():
        folder = Path(".")  # an unknown place is the user's clone
    return f"pip install {editable}{quote(f'{folder}[{extra}]', always=True)}"


def _origin() -> dict[str, Any]:
    """Return where this installation came from, as pip recorded it (PEP 610); empty if it did not."""
    try:
        text = metadata.distribution("lite-dil").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return {}
    return dict(json.loads(text)) if text else {}


def _place(origin: dict[str, Any]) -> str:
    """Return the address of a repository, or of an archive that is still there."""
    if "vcs_info" in origin:
        revision = origin["vcs_info"].get("requested_revision")
        return f"{origin['vcs_info']['vcs']}+{origin['url']}" + (f"@{revision}" if revision else "")
    url = str(origin.get("url", ""))
    return url if "archive_info" in origin and (not url.startswith("file:") or _local(url).is_file()) else ""


def _folder(origin: dict[str, Any]) -> Path | None:
    """Return the folder of the sources, if it is still there."""
    if "dir_info" not in origin:
        return None
    folder = _local(origin["url"])
    return folder if (folder / "pyproject.toml").is_file() else None


def _local(url: str) -> Path:
    return Path(url2pathname(urlsplit(url).path))
