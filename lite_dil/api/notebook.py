"""Training in a notebook: progress and messages below the cell, by IPython's own display call."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lite_dil.api.telling import Logged, tell
from lite_dil.base import display
from lite_dil.base.html import text

_SECONDS = 0.2  # between updates, since each is a message to the browser


def in_notebook() -> bool:
    """Return whether this process is a notebook's kernel, which shows HTML; IPython in a terminal is not one."""
    return hasattr(_shell(), "kernel")


def display_of(given: display.Display | None) -> display.Display:
    """Return the given display, else in a notebook its own, else one that logs."""
    return given or (Notebook() if in_notebook() else Logged())


class Notebook:
    """The `lite_dil.base.display.Display` of a notebook, and its own bar. Messages are logged too."""

    def __init__(self) -> None:
        self._place: Any = None  # IPython's handle of the updated output
        self._cell = -1
        self._clear()

    def _clear(self) -> None:
        self._messages: list[str] = []
        self._bar: tuple[int, int] | None = None
        self._status = self._doing = self._held_out = ""
        self._shown = 0.0

    def say(self, line: str) -> None:
        """Add a line to the messages."""
        tell(line)
        self._renew()
        self._messages.append(line)
        self._show()

    def stopping(self, line: str) -> None:
        """Log that a stop was asked for; the next step shows it."""
        tell(line)
        self._doing = line

    @contextmanager
    def status(self, line: str) -> Iterator[None]:
        """Show the line during the block."""
        self._renew()
        with self.doing(line):
            yield

    @contextmanager
    def bar(self, steps: int, done: int, first: str = "") -> Iterator[Notebook]:
        """Show the progress of `steps` steps."""
        self._renew()
        self._bar, self._status, self._held_out = (done, steps), first, ""
        self._show()
        try:
            yield self
        finally:
            self._doing = ""
            self._show()

    def update(self, step: int, line: dict[str, Any] | None) -> None:
        """Move to `step`, with the line of metrics if one was logged."""
        steps = self._bar[1] if self._bar else step
        self._bar, self._doing = (step, steps), ""
        if line:
            self._status = "  ".join(display.parts(step, steps, line)[1:])
        if step == steps or time.monotonic() - self._shown >= _SECONDS:
            self._show()

    def passes(self, done: int, of: int) -> None:
        """Show the passes of a slow step."""
        if time.monotonic() - self._shown >= display.SLOW:
            self._doing = f"pass {done}/{of}"
            self._show()

    @contextmanager
    def doing(self, line: str) -> Iterator[display.Tell]:
        """Show the line, if any, during the block, and what is told."""
        before = self._doing

        def tell(more: str) -> None:
            self._doing = line and f"{line} ... {more}"
            if not more or time.monotonic() - self._shown >= _SECONDS:
                self._show()

        tell("")
        try:
            yield tell
        finally:
            self._doing = before
            self._show()

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Show the held-out figures."""
        self._held_out = display.held_out(metrics)
        self._show()

    def _renew(self) -> None:
        """Start a new output if another cell is running, as when a run is resumed."""
        cell = getattr(_shell(), "execution_count", -1)
        if cell != self._cell:
            self._place, self._cell = None, cell
            self._clear()

    def _show(self) -> None:
        from IPython.display import HTML
        from IPython.display import display as show

        self._shown = time.monotonic()
        page = HTML(self.html())
        if self._place is None:
            self._place = show(page, display_id=True)
        else:
            self._place.update(page)

    def html(self) -> str:
        """Return the HTML shown."""
        parts = []
        if self._bar:
            done, steps = self._bar
            parts.append(f'<progress value="{done}" max="{steps}" style="width: 20em"></progress> {done}/{steps}')
        parts += [text(line) for line in (self._status, self._held_out, self._doing) if line]
        if self._messages:
            lines = "\n".join(map(text, self._messages))
            title = text(self._messages[-1])
            parts.append(f'<details><summary>{title}</summary><pre style="white-space: pre-wrap">{lines}</pre></details>')
        return f'<div style="font-variant-numeric: tabular-nums">{"<br>".join(parts)}</div>'


def _shell() -> Any:
    """Return the running IPython, or None; it is not imported here, since a notebook has imported it."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module else None
