"""What a run shows while it trains: the protocol of terminals, notebooks and tests, and a display that shows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Bar(Protocol):
    """A progress bar."""

    def update(self, step: int, line: dict[str, Any] | None) -> None:
        """Move to `step`, with its line of metrics if one was logged."""

    def doing(self, text: str, last: bool) -> AbstractContextManager[None]:
        """Show `text`, unless it is empty, while the block runs; `last` is true once the last step is done."""

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Show the held-out figures."""


class Display(Protocol):
    """Shows text and progress to the user."""

    def say(self, text: str) -> None:
        """Show one line of text."""

    def status(self, text: str) -> AbstractContextManager[None]:
        """Show `text` while the block runs."""

    def bar(self, steps: int, done: int, first: str = "") -> AbstractContextManager[Bar]:
        """Show a progress bar of `steps` steps, `done` of them already taken, with `first` until the next one is done."""


class Silent:
    """A display that shows nothing, for programs that call this one; it is also its own bar."""

    def say(self, text: str) -> None:
        """Ignore the line."""

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Run the block."""
        yield

    @contextmanager
    def bar(self, steps: int, done: int, first: str = "") -> Iterator[Bar]:
        """Run the block with a bar that shows nothing."""
        yield self

    def update(self, step: int, line: dict[str, Any] | None) -> None:
        """Ignore the step."""

    @contextmanager
    def doing(self, text: str, last: bool) -> Iterator[None]:
        """Run the block."""
        yield

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Ignore the figures."""
