"""Input from a person: keys and texts on a terminal, read by prompt_toolkit, or lines from a pipe."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lite_dil.base.errors import UserError
from lite_dil.base.files import work_folder, write

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import Output


def read_key() -> str | None:
    """Return the next key pressed, or the next line if the input is not a terminal; None at the end of the input.

    Keys typed before the question are discarded; keys other than letters and digits give "".
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip().lower() if line else None
    from prompt_toolkit import Application
    from prompt_toolkit.input import create_input
    from prompt_toolkit.input.typeahead import clear_typeahead
    from prompt_toolkit.layout import Layout, Window

    keyboard, screen = create_input(), _screen()
    layout = Layout(Window(height=0))
    key: Application[str] = Application(
        layout, key_bindings=_single_keys(), input=keyboard, output=screen, erase_when_done=True
    )
    clear_typeahead(keyboard)
    with suppress(ImportError):  # Windows has none
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)
    try:
        return key.run()
    except EOFError:  # Ctrl-D, or the terminal was closed
        return None


def read_text(question: str) -> str:
    """Return the text typed, possibly of several lines, or the next line if the input is not a terminal.

    Raises EOFError at the end of the input, and for Ctrl-D on an empty line.
    """
    if sys.stdin.isatty():
        return _session().prompt(question, multiline=True, prompt_continuation=" " * len(question))
    if line := sys.stdin.readline():
        return line.rstrip("\r\n")
    raise EOFError


def edit_text(text: str) -> str:
    """Return `text` as changed in the user's editor. Raises UserError if there is none or it fails."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or next(filter(shutil.which, ("nano", "vi", "notepad")), "")
    if not editor:
        raise UserError("no editor found: set EDITOR")
    with work_folder(Path(tempfile.gettempdir()) / "lite-dil") as folder:
        path = folder / "answer.md"
        write(path, text)
        try:
            code = subprocess.call([*shlex.split(editor), str(path)])
            edited = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # no such program, unbalanced quotes, or not UTF-8
            raise UserError(f"the editor {editor!r} cannot be used ({error})") from None
    if code:
        raise UserError(f"the editor {editor!r} ended with exit code {code}")
    return edited.strip()


@cache
def _session() -> PromptSession[str]:
    """Return the prompt session shared by this process, which keeps a history for the arrow keys."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def end(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("escape", "c-j")  # Alt-Enter as it arrives if typed before the question
    def go_on(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(key_bindings=bindings, enable_suspend=True, output=_screen())


def _single_keys() -> KeyBindings:
    """Return key bindings by which the first key ends the question."""
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys

    bindings = KeyBindings()

    @bindings.add(Keys.Any)
    def pressed(event: KeyPressEvent) -> None:
        key = event.data.lower()
        event.app.exit(result=key if len(key) == 1 and key.isascii() and key.isalnum() else "")

    @bindings.add("c-c")
    @bindings.add("<sigint>")
    def stop(event: KeyPressEvent) -> None:
        event.app.exit(exception=KeyboardInterrupt)

    @bindings.add("c-d")
    def end(event: KeyPressEvent) -> None:
        event.app.exit(exception=EOFError)

    @bindings.add("c-z")
    def suspend(event: KeyPressEvent) -> None:
        event.app.suspend_to_background()

    return bindings


def _screen() -> Output:
    from prompt_toolkit.output import create_output
    from prompt_toolkit.output.vt100 import Vt100_Output

    screen = create_output(always_prefer_tty=True)
    if isinstance(screen, Vt100_Output):
        screen.enable_cpr = False  # not every terminal reports its cursor's position, and only menus need it
    return screen
