"""An append-only file of JSON Lines that survives crashes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lite_dil.base.disk import writing
from lite_dil.base.errors import UserError
from lite_dil.base.files import append, appending, cut, make_folder, replacing, sync, write
from lite_dil.base.lock import Lock
from lite_dil.base.strict_json import parse_json

_SAFE = "What was there before is intact, and the same command continues from it"


class JSONLines:
    """An append-only file, one JSON value per line. When `add` returns, all of its rows are on disk; if it fails, none is.

    A last line that was cut off, by a killed process or a full disk, is removed, and so are the zero bytes that a power cut
    may leave; one that lacks only its line feed, as editors leave it, gets one.

    Args:
        path: the first `add` creates it; its folders are created at once.
        use: what the file is for, for messages.
        alone: whether no other process may write to the file while this object lives; it is refused, and so is what an editor
            saved meanwhile.

    Attributes:
        lines: the lines that were there, without line ends.
        size: the file's size in bytes.
        torn: what was removed from the end, for people; "" if nothing was.
    """

    def __init__(self, path: Path, use: str, alone: bool = False) -> None:
        self.path, self.alone = path, alone
        try:
            make_folder(path.parent)
            self._lock = Lock(path, f"file for {use}") if alone else None
            if not os.access(
                path if path.exists() else path.parent, os.W_OK
            ):  # fails now rather than after the first work is done
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            content = path.read_bytes() if path.exists() else b""
            whole, self.torn = content[: content.rfind(b"\n") + 1], ""
            if tail := content[len(whole) :]:
                rest = tail.strip(b"\0 \t\r")
                if rest and not rest.startswith(b"{"):
                    raise UserError(f"{path}: not JSON Lines; give another file for {use}")
                if is_json(tail):
                    with appending(path) as file:
                        append(file, b"\n")
                    whole = content + b"\n"
                else:
                    cut(path, len(whole))
                    self.torn = f"{path}: its last line was cut off and is removed" if rest else f"{path}: zeros are removed"
        except OSError as error:
            raise UserError(f"{path}: cannot be used for {use} ({error})") from None
        self.lines, self.size = whole.split(b"\n")[:-1], len(whole)

    def add(self, *rows: Any) -> None:
        """Append rows, all or none of them."""
        data = _encoded(rows)
        with writing(self.path, safe=_SAFE), appending(self.path) as file:
            before = file.seek(0, os.SEEK_END)
            self._same(before)
            append(file, data, sync=True)
            if not before:  # the file may be new
                sync(self.path.parent)
        self.size = before + len(data)

    def cut(self, size: int) -> None:
        """Cut the file back to `size` bytes."""
        if size == self.size:
            return
        with writing(self.path):
            self._same(self.path.stat().st_size)
            cut(self.path, size)
        self.size = size

    def _same(self, size: int) -> None:
        if self.alone and size != self.size:
            raise UserError(f"{self.path}: another program changed it meanwhile; start again to continue with it")

    def rewrite(self, rows: list[Any]) -> None:
        """Replace the whole content with `rows`, in one step."""
        data = _encoded(rows)
        if self.path.exists():
            self._same(self.path.stat().st_size)
        # A link stays: its target is replaced.
        with writing(self.path, safe=_SAFE), replacing(self.path.resolve()) as part:
            write(part, data, sync=True)
        self.size = len(data)


def _encoded(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def is_json(text: str | bytes) -> bool:
    """Return whether a text is a JSON value that `parse_json` reads."""
    try:
        parse_json(text)
    except ValueError:
        return False
    return True
