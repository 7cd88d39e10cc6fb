"""What only one process may write: a run's folder, a file of answers or labels."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

from lite_dil.base.disk import writing
from lite_dil.base.errors import UserError
from lite_dil.base.files import AlreadyHeld, give_back, hold, make_folder


class Lock:
    """Holds a file or folder until `release`, or until this object is gone.

    The lock is a hidden file: in the folder, or next to the file.

    Args:
        path: the file or folder.
        other: how the user names another one, for the message, such as "--output".
        say: is told if the file system has no locks.

    Raises UserError if another process, or another part of this one, holds it.
    """

    def __init__(self, path: Path, other: str, say: Callable[[str], None] | None = None) -> None:
        marker = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
        try:
            with writing(marker):
                make_folder(marker.parent)
                file, problem = hold(marker)
        except AlreadyHeld as holder:
            who = f"process {holder}" if str(holder) else "another process"
            who = "this process" if str(holder) == str(os.getpid()) else who
            raise UserError(f"{path}: {who} is writing there; wait for its end or stop it, or give another {other}") from None
        if problem and say:
            say(f"{path}: this file system has no locks ({problem.strerror}); start nothing else that writes there")
        self._release = weakref.finalize(self, give_back, file, marker)

    def release(self) -> None:
        """Give it back; further calls change nothing."""
        self._release()
