"""What a run says while it goes: the protocol that a terminal, a notebook or a test fulfils, and one that shows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Bar(Protocol):
    """The progress of one piece of work."""

    def update(self, step: int, line: dict[str, Any] | None) -> None:
        """Move to `step`, with the line of metrics where one was logged."""

    def doing(self, text: str, last: bool) -> AbstractContextManager[None]:
        """Say what takes a while in the block, if `text` says something; `last` tells that the last step is done."""

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Show the held-out figures."""


class Display(Protocol):
    """Speaks to the user."""

    def say(self, text: str) -> None:
        """Show one line of text as it stands."""

    def status(self, text: str) -> AbstractContextManager[None]:
        """Show what takes a while in the block."""

    def bar(self, steps: int, done: int, first: str = "") -> AbstractContextManager[Bar]:
        """Show the progress of `steps` steps, `done` of them already behind, with the text `first` until the next is done."""

    def stopping(self, text: str) -> None:
        """Show, out of a signal's handler, that a stop was asked for."""


class Silent:
    """A display that shows nothing, for programs that call this one; it is its own bar."""

    def say(self, text: str) -> None:
        """Drop the line."""

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Run the block."""
        yield

    @contextmanager
    def bar(self, steps: int, done: int, first: str = "") -> Iterator[Bar]:
        """Run the block with a bar that shows nothing."""
        yield self

    def stopping(self, text: str) -> None:
        """Drop the line."""

    def update(self, step: int, line: dict[str, Any] | None) -> None:
        """Drop the step."""

    @contextmanager
    def doing(self, text: str, last: bool) -> Iterator[None]:
        """Run the block."""
        yield

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Drop the figures."""


def status(line: dict[str, Any]) -> str:
    """Return a line of metrics in a few words."""
    unit = "pairs" if "rewards/accuracies" in line else "answers"
    return f"{figures(line, 2)}  {line['examples_per_second']:.2f} {unit}/s  {line['peak_memory_mb']:.0f} MB"


def figures(line: dict[str, Any], digits: int) -> str:
    """Lay out what there is: single answers have no accuracy, demonstrations no rejected side."""
    text = f"loss {line['loss']:.4f}"
    if "rewards/accuracies" in line:
        text += f"  accuracy {line['rewards/accuracies']:.{digits}f}"
    sides = [f"{side} {line[name]:+.3f}" for side in ("chosen", "rejected") if (name := f"log_ratio/{side}") in line]
    return f"{text}  log-ratio {' '.join(sides)}"


def held_out(line: dict[str, Any]) -> str:
    """Return held-out figures in a few words."""
    return f"held out: {figures({name.removeprefix('eval_'): value for name, value in line.items()}, 3)}"
