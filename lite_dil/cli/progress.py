"""The display on standard output: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task
from rich.progress import Progress as RichProgress
from rich.text import Text

from lite_dil.base.display import held_out, parts
from lite_dil.base.signals import to_stderr
from lite_dil.base.text import printable

_BAR = 12  # characters of a bar


class Terminal:
    """The `lite_dil.base.display.Display` of the command line; it prints to standard output, or to `console`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line of text, without markup."""
        self.console.print(printable(text), markup=False, emoji=False)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show the text during the block: with a spinner on a terminal, as a line elsewhere."""
        if not self.console.is_terminal:
            self.say(f"{text} ...")
            yield
            return
        with self.console.status(escape(text)):
            yield

    def stopping(self, text: str) -> None:
        """Write the line to standard error, even in the middle of other output."""
        to_stderr(text)

    @contextmanager
    def bar(self, steps: int, done: int, first: str = "") -> Iterator[TerminalBar]:
        """Show the progress of `steps` steps, `done` of which are done, with the text `first` until the next one ends."""
        if not self.console.is_terminal:
            yield TerminalBar(self, steps, None)
            return
        with RichProgress(SpinnerColumn(), BarColumn(_BAR), _Fitted(self.console), console=self.console) as live:
            live.add_task("", total=steps, completed=done, parts=[f"step {done}/{steps}", first])
            yield TerminalBar(self, steps, live)


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

    def __init__(self, display: Terminal, steps: int, live: RichProgress | None) -> None:
        self.display, self.steps, self.live = display, steps, live
        self.line: dict[str, Any] | None = None

    def update(self, step: int, line: dict[str, Any] | None) -> None:
        """Move to `step`, with the line of metrics if one was logged."""
        self.line = line or self.line
        shown = parts(step, self.steps, self.line) if self.line else [f"step {step}/{self.steps}"]
        if self.live:
            self.live.update(self.live.task_ids[0], completed=step, parts=shown)
        elif line:
            self.display.say("  ".join(shown))

    @contextmanager
    def doing(self, text: str, last: bool) -> Iterator[None]:
        """Show the text, if any, during the block; without a live bar only after the `last` step."""
        if not text or not (self.live or last):
            yield
        elif not self.live:
            self.display.say(f"{text} ...")
            yield
        else:
            task = self.live.tasks[0]
            before = task.fields["parts"]
            self.live.update(task.id, parts=[before[0], f"{text} ..."])
            yield
            self.live.update(task.id, parts=before)

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Print the held-out figures."""
        self.display.say(held_out(metrics))
