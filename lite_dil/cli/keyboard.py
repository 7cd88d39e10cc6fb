"""What a person says: single keys on a terminal, lines where the input is a pipe, and texts."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from lite_dil.base.errors import UserError
from lite_dil.base.files import work_folder, write


def read_key() -> str | None:
    """Return the key that is pressed next, or the next line where the input is no terminal; None at the input's end.

    What was typed before, while nothing was asked, is thrown away; keys that are no letter or digit are "".
    """
    sys.stdout.flush()
    if sys.stdin.isatty() and os.name == "posix":
        return _pressed(sys.stdin.fileno())
    line = sys.stdin.readline()
    return line.strip().lower() if line else None


def read_text(question: str) -> str:
    """Return a line of text, empty where there is none."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().strip()
    with suppress(ImportError):  # arrows and history in what is typed, where the system has it
        import readline  # noqa: F401
    try:
        return input(question).strip()
    except EOFError:
        return ""


def edit_text(text: str) -> str:
    """Return what is left of `text` after the user's own editor. Raises UserError where there is none, or where it fails."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or next(filter(shutil.which, ("nano", "vi", "notepad")), "")
    if not editor:
        raise UserError("no editor: set EDITOR to one")
    with work_folder(Path(tempfile.gettempdir()) / "lite-dil") as folder:
        path = folder / "answer.md"
        write(path, text)
        try:
            code = subprocess.call([*shlex.split(editor), str(path)])
            edited = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # no such program, quotes that do not close, or not UTF-8
            raise UserError(f"the editor {editor!r} cannot be used ({error})") from None
    if code:
        raise UserError(f"the editor {editor!r} ended with exit code {code}")
    return edited.strip()


def _pressed(terminal: int) -> str | None:
    import termios
    import tty

    try:
        before = termios.tcgetattr(terminal)
        try:
            tty.setcbreak(terminal)  # which also drops what is waiting
            pressed = os.read(terminal, 1)
            if pressed == b"\x1b" or pressed >= b"\x80":  # an arrow, say, or a letter of several bytes: one key
                while select.select([terminal], [], [], 0.02)[0] and os.read(terminal, 64):
                    pressed = b"\x1b"
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    except (OSError, termios.error):  # the terminal is gone
        return None
    if pressed in (b"", b"\x04"):
        return None
    key = pressed.decode("ascii", "ignore").lower()
    return key if key.isalnum() else ""
