"""Ctrl-C as a request to stop at a good place."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """Turns the first Ctrl-C or termination signal into a request to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self, text: str = "stopping after this step, and saving") -> None:
        self.asked, self.text = False, text

    def __enter__(self) -> StopSignal:
        self._before = {}
        for name in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[name] = signal.signal(name, self._ask)
            except ValueError:  # not in the main thread, where Python allows no handlers
                break
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.text}; Ctrl-C again stops at once\n".encode())
