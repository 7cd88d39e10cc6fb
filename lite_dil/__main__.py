"""The program: ``lite-dil``, or ``python -m lite_dil``. Ctrl-C ends it quietly, even while Python is importing modules."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TextIO, cast


def main() -> int:
    """Run the command line; return the exit code."""
    # A program that was started in the background may have to ignore Ctrl-C.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _at_ctrl_c(_leave, heard)
    from lite_dil.base.redaction import Redacted
    from lite_dil.cli.main import main as run

    if sys.stderr is not None:
        sys.stderr = cast(TextIO, Redacted(sys.stderr))  # of libraries' messages and of tracebacks too

    _at_ctrl_c(signal.default_int_handler, heard)
    try:
        return run()
    finally:
        _at_ctrl_c(_leave, heard)  # only Python's own shutdown is left


def _at_ctrl_c(do: Callable[[int, FrameType | None], None], heard: bool) -> None:
    if heard:
        signal.signal(signal.SIGINT, do)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
