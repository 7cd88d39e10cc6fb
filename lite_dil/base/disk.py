"""Disks that fail, full, read-only, broken or gone: what was written, why it failed and the fix, in one message.

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
# The last two are of folders of a network, a mounted Google Drive for one.
_BROKEN = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, getattr(errno, "ESTALE", errno.EIO)}


class DiskFailed(UserError):
    """A file that cannot be written.

    Args:
        what: was written, as a rule its path; or whatever `verb` says.
        error: the system's.
        place: the option or variable that names another place for it, if there is one.
        safe: what is not lost, for people, if there is something to say.
    """

    def __init__(self, what: str | Path, error: OSError, place: str = "", safe: str = "", verb: str = "written") -> None:
        fixes = []
        if error.errno in _FULL:
            fixes.append("free space there")
        elif error.errno in _REFUSED:
            fixes.append("make it writable")
        elif error.errno in _BROKEN:
            fixes.append("check whether its disk is full, failing or gone")
        if place:
            fixes.append(f"name another place with {place}")
        text = f"{what}: cannot be {verb} ({error.strerror or first_line(error)})"
        super().__init__("; ".join([text, *([", or ".join(fixes)] if fixes else [])]) + (f". {safe}" if safe else ""))


@contextmanager
def writing(what: str | Path, place: str = "", safe: str = "") -> Iterator[None]:
    """Raise DiskFailed where the block, which writes files and does nothing else, meets an error of the system."""
    try:
        yield
    except _raised() as error:
        if (cause := _cause(error) or _before(error)) is None:
            raise
        raise DiskFailed(what, cause, place, safe) from None


@contextmanager
def failing(what: str | Path = "", place: str = "", safe: str = "") -> Iterator[None]:
    """Raise DiskFailed where the disk fails in the block; errors that may be the program's own, as of a missing file, stay.

    Args:
        what: the block writes; where nothing is given, the file that the error names, or standard output.
    """
    try:
        yield
    except _raised() as error:
        cause = _cause(error)
        if cause is None or cause.errno not in _FULL | _REFUSED | _BROKEN:
            raise
        verb = "written"
        if cause.errno not in _FULL | {errno.EROFS}:  # the others are of a file that is read, too
            if cause.filename:
                what, verb = cause.filename, "read or written"
            elif not what and not output_fails():  # of something else than a file
                raise
        what = what or cause.filename or ("standard output" if output_fails() else "standard output or a temporary file")
        raise DiskFailed(what, cause, place, safe, verb) from None


def _raised() -> tuple[type[Exception], ...]:
    """Return what is raised where a disk fails: by Python, by torch and MLX, and by safetensors."""
    # One that is not imported, or only in part, has raised nothing; `--help` does without it.
    return (OSError, RuntimeError, getattr(sys.modules.get("safetensors"), "SafetensorError", OSError))


def _cause(error: BaseException) -> OSError | None:
    """Return the system's error behind that of a library, or None where there is none."""
    if isinstance(error, OSError):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # as Rust writes it
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if str(error).startswith("[write] "):  # MLX, which does not say why
        return OSError(errno.EIO, first_line(error).removeprefix("[write] ").rstrip("."))
    return None


def _before(error: BaseException) -> OSError | None:
    """Return the system's error after which torch complained of the file that a failed write left, or None."""
    before = error.__context__ if type(error) is RuntimeError else None
    while before is not None and not (isinstance(before, OSError) and before.errno in _FULL | _REFUSED | _BROKEN):
        before = before.__context__
    return before


def output_fails() -> bool:
    """Return whether what was printed cannot be written."""
    try:
        flush()
    except OSError:
        return True
    return False


def flush() -> None:
    """Write what was printed, where there is an output."""
    if sys.stdout is not None:
        sys.stdout.flush()
