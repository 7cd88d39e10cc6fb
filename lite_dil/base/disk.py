"""Disk failures (full, read-only, broken, gone): what was being written, why it failed and the fix, in one message.

Files are written by `lite_dil.base.files`.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lite_dil.base.errors import UserError, first_line

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
# The last two come from network folders, such as a mounted Google Drive.
_BROKEN = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, getattr(errno, "ESTALE", errno.EIO)}


class DiskFailed(UserError):
    """A file that cannot be written.

    Args:
        what: what could not be written, usually a path.
        error: the system's error.
        place: the option or variable that sets another place for it, if there is one.
        safe: a sentence on what is not lost, if there is one.
        verb: what failed, by default "written".
    """

    def __init__(self, what: str | Path, error: OSError, place: str = "", safe: str = "", verb: str = "written") -> None:
        fixes = []
        if error.errno in _FULL:
            fixes.append("free space there")
        elif error.errno in _REFUSED:
            fixes.append("make it writable")
        elif error.errno in _BROKEN:
            fixes.append("check whether its disk is full, failing or disconnected")
        if place:
            fixes.append(f"choose another place with {place}")
        text = f"{what}: cannot be {verb} ({error.strerror or first_line(error)})"
        super().__init__("; ".join([text, *([", or ".join(fixes)] if fixes else [])]) + (f". {safe}" if safe else ""))


@contextmanager
def writing(what: str | Path, place: str = "", safe: str = "") -> Iterator[None]:
    """Raise DiskFailed if the block, which only writes files, meets a system error."""
    try:
        yield
    except _raised() as error:
        if (cause := _cause(error) or _before(error)) is None:
            raise
        raise DiskFailed(what, cause, place, safe) from None


@contextmanager
def failing(what: str | Path = "", place: str = "", safe: str = "") -> Iterator[None]:
    """Raise DiskFailed if the disk fails in the block; errors that may be the program's own (a missing file) pass through.

    Args:
        what: what the block writes; by default the file that the error names, or standard output.
    """
    try:
        yield
    except _raised() as error:
        cause = _cause(error)
        if cause is None or cause.errno not in _FULL | _REFUSED | _BROKEN:
            raise
        verb = "written"
        if cause.errno not in _FULL | {errno.EROFS}:  # the other errors may come from reading
            if cause.filename:
                what, verb = cause.filename, "read or written"
            elif not what and not output_fails():  # not a file
                raise
        what = what or cause.filename or ("standard output" if output_fails() else "standard output or a temporary file")
        raise DiskFailed(what, cause, place, safe, verb) from None


def _raised() -> tuple[type[Exception], ...]:
    """Return the exceptions that a disk failure raises: in Python, in torch and MLX, and in safetensors."""
    # Safetensors may not be imported, or only in part; then it has raised nothing.
    return (OSError, RuntimeError, getattr(sys.modules.get("safetensors"), "SafetensorError", OSError))


def _cause(error: BaseException) -> OSError | None:
    """Return the system error behind a library's error, or None."""
    if isinstance(error, OSError):
        # numpy's tofile does not say why.
        return OSError(errno.EIO, str(error)) if re.fullmatch(r"\d+ requested and \d+ written", str(error)) else error
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # as Rust writes it
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if str(error).startswith("[write] "):  # MLX, which does not say why
        return OSError(errno.EIO, first_line(error).removeprefix("[write] ").rstrip("."))
    return None


def _before(error: BaseException) -> OSError | None:
    """Return the system error that made torch complain about the file left by a failed write, or None."""
    before = error.__context__ if type(error) is RuntimeError else None
    while before is not None and not (isinstance(before, OSError) and before.errno in _FULL | _REFUSED | _BROKEN):
        before = before.__context__
    return before


def output_fails() -> bool:
    """Return whether standard output cannot be written."""
    try:
        flush()
    except OSError:
        return True
    return False


def flush() -> None:
    """Flush standard output, if there is one."""
    if sys.stdout is not None:
        sys.stdout.flush()
