"""Observers of a training: they write, show and measure while it runs, and do not change it."""

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
    """The state of a training when an observer is called.

    Figures are already reduced over processes, so that one process can write what several have computed.

    Attributes:
        step: the number of steps done.
        steps: the number of steps of the whole training.
        line: the line of metrics logged at this step, or None.
        stop: long work calls it and ends early if it returns true.
    """

    step: int
    steps: int
    line: dict[str, Any] | None = None
    stop: Callable[[], bool] = _never

    @property
    def last(self) -> bool:
        """Whether this was the last step."""
        return self.step == self.steps

    def due(self, every: int | None) -> bool:
        """Return whether the step is a multiple of `every`, or the last one; with None, only the last one."""
        return self.last or (self.step > 0 and bool(every) and self.step % (every or 1) == 0)


class Observer(Protocol):
    """Is called at each event of a training and decides itself whether to act; a subclass defines the methods it needs.

    Attributes:
        writes: whether it writes files. If several processes train together, only the first has observers that write.
        left_out: whether work was skipped because a stop was requested; a resumed training catches up on it.
    """

    writes: bool = False
    left_out: bool = False

    def started(self, event: Event) -> None:
        """Called at the start of the loop; in a resumed training, catch up on what `event.step` lacks."""
        return

    def within_step(self, event: Event, passes: int, done: int) -> None:
        """Called when `done` of the `passes` of the step after `event.step` are done."""
        return

    def after_step(self, event: Event) -> None:
        """Called after a step that changed the weights and had a finite loss."""
        return

    def stopped(self, event: Event) -> None:
        """Called when the training stops on request before its last step."""
        return

    def finished(self, event: Event) -> None:
        """Called at the end of a training that took all its steps."""
        return

    def failed(self, error: BaseException) -> None:
        """Called with the error that ends the training; it is raised again afterwards."""
        return


class Observers:
    """Several observers, called in order; in a ``with`` block, an error that ends the block goes to their `failed`."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)

    @property
    def left_out(self) -> bool:
        """Whether any of them skipped work."""
        return any(observer.left_out for observer in self._observers)

    def started(self, event: Event) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.started(event)

    def within_step(self, event: Event, passes: int, done: int) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.within_step(event, passes, done)

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
            with ExitStack() as all_hear:  # even if one of them fails
                for observer in reversed(self._observers):
                    all_hear.callback(observer.failed, error)
