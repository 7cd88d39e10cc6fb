"""The display on standard output: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task
from rich.progress import Progress as RichProgress
from rich.text import Text

from lite_dil.base.display import SLOW, Tell, held_out, parts, unheard
from lite_dil.base.redaction import redacted
from lite_dil.base.signals import to_stderr
from lite_dil.base.text import printable

_BAR = 12  # characters of a bar


class Terminal:
    """The `lite_dil.base.display.Display` of the command line; it prints to standard output, or to `console`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    @property
    def _spinner(self) -> str:
        """One that the terminal's encoding has."""
        return "dots" if self.console.encoding.startswith("utf") else "line"

    def say(self, text: str) -> None:
        """Print one line of text, without markup and without secrets."""
        self.console.print(printable(redacted(text)), markup=False, emoji=False)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show the text during the block: with a spinner on a terminal, as a line elsewhere."""
        if not self.console.is_terminal:
            self.say(f"{text} ...")
            yield
            return
        with self.console.status(escape(printable(redacted(text))), spinner=self._spinner):
            yield

    def stopping(self, text: str) -> None:
        """Write the line to standard error, even in the middle of other output."""
        to_stderr(text)

    @contextmanager
    def bar(self, steps: int, done: int, first: str = "") -> Iterator[TerminalBar]:
        """Show the progress of `steps` steps, `done` of which are done, with the text `first` until the next one ends."""
        if not self.console.is_terminal:
            if first:
                self.say(f"step {done + 1}/{steps}: {first} ...")
            yield TerminalBar(self, steps, None)
            return
        with RichProgress(_Spinner(self._spinner), BarColumn(_BAR), _Fitted(self.console), console=self.console) as live:
            shown = [f"step {done}/{steps}", first]
            task = live.add_task("", total=steps, completed=done, parts=shown, over=False)
            try:
                yield TerminalBar(self, steps, live, shown)
            finally:
                live.update(task, over=True)


class _Spinner(SpinnerColumn):
    """Spins until the bar is over: the last evaluation and the sample answers come after the last step."""

    def render(self, task: Task) -> RenderableType:
        """Return the frame to show now."""
        return " " if task.fields["over"] else self.spinner.render(task.get_time())


class _Fitted(ProgressColumn):
    """As many of a task's parts as fit on one line with the spinner and the bar, the most important first."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        """Return the line: the first part always, and each later part that still fits."""
        text, *others = task.fields["parts"]
        for part in others:
            if part and len(text) + 2 + len(part) <= self.console.width - _BAR - 3:
                text += f"  {part}"
        return Text(text, no_wrap=True, overflow="ellipsis")


class TerminalBar:
    """The progress of one run: `lite_dil.base.display.Bar`."""

    def __init__(self, display: Terminal, steps: int, live: RichProgress | None, shown: Sequence[str] = ()) -> None:
        self.display, self.steps, self.live, self._steps = display, steps, live, shown
        self.line: dict[str, Any] | None = None
        self._since = time.monotonic()

    def update(self, step: int, line: dict[str, Any] | None) -> None:
        """Move to `step`, with the line of metrics if one was logged."""
        self.line = line or self.line
        shown = parts(step, self.steps, self.line) if self.line else [f"step {step}/{self.steps}"]
        if self.live:
            self.live.update(self.live.task_ids[0], completed=step, parts=shown)
        elif line:
            self.display.say("  ".join(shown))
        self._since, self._steps = time.monotonic(), shown

    def passes(self, done: int, of: int) -> None:
        """Show the passes of a slow step, on a live bar."""
        if self.live and time.monotonic() - self._since >= SLOW:
            shown = [self._steps[0], f"pass {done}/{of}", *self._steps[1:]]
            self.live.update(self.live.task_ids[0], parts=shown)

    @contextmanager
    def doing(self, text: str) -> Iterator[Tell]:
        """Show the text during the block: without a live bar as a line, with another one for what is told first."""
        if not text:
            yield unheard
            return
        live, told = self.live, False

        def tell(more: str) -> None:
            nonlocal told
            if live:
                live.update(live.task_ids[0], parts=[self._steps[0], f"{text} ...", more])
            elif not told:
                self.display.say(f"{text}: {more}" if more else f"{text} ...")
                told = bool(more)

        tell("")
        yield tell
        if live:
            live.update(live.task_ids[0], parts=self._steps)
            self._since = time.monotonic()

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Print the held-out figures."""
        self.display.say(held_out(metrics))
