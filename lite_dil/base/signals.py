"""Ctrl-C as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType


def to_stderr(text: str) -> None:
    """Write a line to standard error, without print: the signal may have come in the middle of one."""
    os.write(2, f"\n{text}\n".encode())


class StopSignal:
    """Turns the first of `signals` into a request to stop after the step; a second Ctrl-C stops immediately.

    `text` is printed when the signal comes, unless it is empty.
    """

    def __init__(
        self,
        text: str = "stopping after this step, and saving",
        signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
        tell: Callable[[str], None] = to_stderr,
    ) -> None:
        self.asked, self.text, self.signals, self.tell = False, text, signals, tell

    def __enter__(self) -> StopSignal:
        self._before, self._process = {}, os.getpid()
        for name in self.signals:
            try:
                self._before[name] = signal.signal(name, self._ask)
            except ValueError:  # not in the main thread, where Python allows no handlers
                break
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that the user's code forked ends as it would without this handler
            signal.signal(number, self._before[signal.Signals(number)] or signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self.text:
            self.tell(f"{self.text}; Ctrl-C again stops at once")
