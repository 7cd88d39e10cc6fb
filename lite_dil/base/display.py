"""What a run shows while it trains: the protocol of terminals, notebooks and tests, and a display that shows nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

SLOW = 2.0  # seconds after which something slow says how far it is
Tell = Callable[[str], None]
Count = Callable[[int], None]


def uncounted(done: int) -> None:
    """Ignore how much is done."""


def unheard(text: str) -> None:
    """Ignore the text."""


class Bar(Protocol):
    """A progress bar."""

    def update(self, step: int, line: dict[str, Any] | None) -> None:
        """Move to `step`, with its line of metrics if one was logged."""

    def passes(self, done: int, of: int) -> None:
        """Show how many passes of the next step are done, if it is slow."""

    def doing(self, text: str) -> AbstractContextManager[Tell]:
        """Show `text`, unless it is empty, while the block runs, and beside it what the yielded function is called with."""

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

    def stopping(self, text: str) -> None:
        """Show, out of a signal's handler, that a stop was asked for."""


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

    def stopping(self, text: str) -> None:
        """Ignore the line."""

    def update(self, step: int, line: dict[str, Any] | None) -> None:
        """Ignore the step."""

    def passes(self, done: int, of: int) -> None:
        """Ignore the passes."""

    @contextmanager
    def doing(self, text: str) -> Iterator[Tell]:
        """Run the block."""
        yield unheard

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Ignore the figures."""


class TimeLeft:
    """Tells how long the rest of some work will take, from what is done; nothing while it is not slow.

    The first piece is left out: it may wait for a compilation, or for a prompt.

    Args:
        tell: called with a few words.
        of: the pieces of the whole work.
        word: "about", or "at most" if the work may end before the last piece.
    """

    def __init__(self, tell: Tell, of: int, word: str = "about", clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._of, self._word, self._clock = tell, of, word, clock
        self._began, self._done = 0.0, 0

    def add(self) -> None:
        """Count one more piece as done."""
        self._done += 1
        if self._done == 1:
            self._began = self._clock()
        elif (seconds := self._clock() - self._began) >= SLOW:
            self._tell(f"{self._word} {duration(max(0, self._of - self._done) * seconds / (self._done - 1))} left")


def parts(step: int, steps: int, line: dict[str, Any]) -> list[str]:
    """Return the parts of a progress line for a step and its metrics, the most important first."""
    found = [f"step {step}/{steps}"]
    if step < steps:
        found.append(f"{duration((steps - step) * line['seconds_per_step'])} left")
    paired = "rewards/accuracies" in line or "accuracy" in line
    unit = "prompts" if "completions/mean_length" in line else "pairs" if paired else "answers"
    found += [*figures(line, 2), f"{line['examples_per_second']:.2f} {unit}/s", f"{line['peak_memory_mb']:.0f} MB"]
    return found


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figures(line: dict[str, Any], digits: int) -> list[str]:
    """Return the figures that exist: single responses have no accuracy, demonstrations no rejected side."""
    found = [f"loss {line['loss']:.4f}"]
    if "reward" in line:  # of a policy's own answers
        found = [f"reward {line['reward']:.3f}", f"KL {line['kl/answer']:.3f} an answer"]
    for name in ("rewards/accuracies", "accuracy"):  # of a policy, of a reward model
        if name in line:
            found.append(f"accuracy {line[name]:.{digits}f}")
    if "longer_accuracy" in line:
        found.append(f"the longer one {line['longer_accuracy']:.{digits}f}")
    scores = [f"{side} {line[name]:+.3f}" for side in ("chosen", "rejected") if (name := f"reward/{side}") in line]
    if scores:
        return [*found, f"reward {' '.join(scores)}"]
    sides = [f"{side} {line[name]:+.3f}" for side in ("chosen", "rejected") if (name := f"log_ratio/{side}") in line]
    return [*found, f"log-ratio {' '.join(sides)}"] if sides else found


def held_out(line: dict[str, Any]) -> str:
    """Return a line of held-out figures with their step."""
    found = figures({name.removeprefix("eval_"): value for name, value in line.items()}, 3)
    return f"held out, step {line['step']}: {'  '.join(found)}"
