"""Ctrl-C as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
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
        self._before = {}
        for name in self.signals:
            try:
                self._before[name] = signal.signal(name, self._ask)
            except ValueError:  # not in the main thread, where Python allows no handlers
                break
        _ACTIVE.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _ACTIVE:  # in a forked process it has ended already
            _ACTIVE.remove(self)
            for name, handler in self._before.items():
                signal.signal(name, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self.text:
            self.tell(f"{self.text}; Ctrl-C again stops at once")


# --- processes that the user's code forks, such as a pool's workers, end by a signal as they would without us

_ACTIVE: list[StopSignal] = []
_FORKING = threading.local()


def _before_fork() -> None:
    # A signal that came before the new process has its own handlers would be lost.
    _FORKING.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {name for stop in _ACTIVE for name in stop.signals})


def _in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _FORKING.mask)


def _in_child() -> None:
    while _ACTIVE:
        _ACTIVE[-1].__exit__()
    signal.pthread_sigmask(signal.SIG_SETMASK, _FORKING.mask)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
