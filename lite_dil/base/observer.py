"""Observers of a training: they write, show and measure while the loop goes on, and change nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Event:
    """Where a training stands when an observer is called.

    Its figures are numbers that were reduced already, so that one process can write what several have computed.

    Attributes:
        step: steps that are done.
        steps: of the whole training.
        line: the line of metrics that ends with this step; None between lines.
        stop: asked in what takes long, which ends early where it returns true.
    """

    step: int
    steps: int
    line: dict[str, Any] | None = None
    stop: Callable[[], bool] = _never

    @property
    def last(self) -> bool:
        """Whether no step is left."""
        return self.step == self.steps

    def due(self, every: int | None) -> bool:
        """Return whether the step is a multiple of `every`, or the last one; with None, the last one only."""
        return self.last or (self.step > 0 and bool(every) and self.step % (every or 1) == 0)


class Observer(Protocol):
    """Is called at the moments of a training, and decides itself whether it is due; a subclass defines those it needs.

    Attributes:
        writes: whether it writes files. Where several processes train together, the first one alone has those that do.
        left_out: whether something was left out because a stop was asked for; a training that is resumed makes up for it.
    """

    writes: bool = False
    left_out: bool = False

    def started(self, event: Event) -> None:
        """Take the start of the loop; in a resumed training, make up for what is missing of `event.step`."""
        return

    def after_step(self, event: Event) -> None:
        """Take a step, its weights changed and its loss finite."""
        return

    def stopped(self, event: Event) -> None:
        """Take the end of a training that was asked to stop before its last step."""
        return

    def finished(self, event: Event) -> None:
        """Take the end of a training that took all its steps."""
        return

    def failed(self, error: BaseException) -> None:
        """Take the error that ends the training. It is raised again afterwards."""
        return


class Observers:
    """Several observers, called in their order; in a ``with`` block they hear of the error that ends it."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)

    @property
    def left_out(self) -> bool:
        """Whether one of them left something out."""
        return any(observer.left_out for observer in self._observers)

    def started(self, event: Event) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.started(event)

    def after_step(self, event: Event) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.after_step(event)

    def stopped(self, event: Event) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.stopped(event)

    def finished(self, event: Event) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.finished(event)

    def __enter__(self) -> Observers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            with ExitStack() as all_hear:  # also where one of them fails at it
                for observer in reversed(self._observers):
                    all_hear.callback(observer.failed, error)
