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


def parts(step: int, steps: int, line: dict[str, Any]) -> list[str]:
    """Return what there is to say of a step and its line of metrics, what matters most first."""
    found = [f"step {step}/{steps}"]
    if step < steps:
        found.append(f"{duration((steps - step) * line['seconds_per_step'])} left")
    unit = "pairs" if "rewards/accuracies" in line else "answers"
    found += [*figures(line, 2), f"{line['examples_per_second']:.2f} {unit}/s", f"{line['peak_memory_mb']:.0f} MB"]
    return found


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figures(line: dict[str, Any], digits: int) -> list[str]:
    """Return the figures that there are: single answers have no accuracy, demonstrations no rejected side."""
    found = [f"loss {line['loss']:.4f}"]
    if "rewards/accuracies" in line:
        found.append(f"accuracy {line['rewards/accuracies']:.{digits}f}")
    sides = [f"{side} {line[name]:+.3f}" for side in ("chosen", "rejected") if (name := f"log_ratio/{side}") in line]
    return [*found, f"log-ratio {' '.join(sides)}"] if sides else found


def held_out(line: dict[str, Any]) -> str:
    """Return held-out figures, and after which step they were computed."""
    found = figures({name.removeprefix("eval_"): value for name, value in line.items()}, 3)
    return f"held out, step {line['step']}: {'  '.join(found)}"
