"""The training loop: one for every backend and every objective."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lite_dil.backends.types import StepResult
from lite_dil.base.disk import DiskFailed
from lite_dil.base.errors import OutOfMemory, TrainingDiverged, UserError
from lite_dil.base.observer import Event, Observers
from lite_dil.base.signals import StopSignal, to_stderr
from lite_dil.batching.schedule import LargestPass, Schedule
from lite_dil.data.encoder import Example
from lite_dil.objectives.loss import SCORES
from lite_dil.objectives.options import ResolvedObjective
from lite_dil.runs.progress import Progress
from lite_dil.training.divergence import Finite, explain
from lite_dil.training.metrics import add_figures, count_step, line_of
from lite_dil.training.passes import Passes
from lite_dil.training.reward_metrics import add_score_figures
from lite_dil.training.step import AnyCriterion, Taken, take_step


class Took(Protocol):
    """A finished step."""

    @property
    def result(self) -> StepResult:
        """What the backend returned."""


T = TypeVar("T", bound=Took)


class Steps(Protocol[T]):
    """A training as the loop sees it.

    Attributes:
        progress: updated by each step; saved in checkpoints.
        steps: the number of steps of the whole training, which `count` may lower to those done: it then ends.
        stopping: shows, from a signal handler, that a stop was asked for.
    """

    @property
    def progress(self) -> Progress:
        """See above."""

    @property
    def steps(self) -> int:
        """See above."""

    @property
    def stopping(self) -> Callable[[str], None]:
        """See above."""

    def take(self, step: int, tell: Callable[[int, int], None]) -> T:
        """Take a step; `tell` is called with the number of its passes, and of those done."""

    def count(self, taken: T, seconds: float) -> dict[str, Any] | None:
        """Count a step as done; return a line of metrics if one is due."""

    def explain(self, step: int, taken: T, kept: Path | None) -> str:
        """Say why a step with a loss or gradient that is not finite ended the training, and what helps.

        Args:
            kept: the last good checkpoint.
        """

    def sync(self) -> None:
        """Wait until what the steps kept outside of the run is on the disk."""

    def save_state(self, folder: Path) -> None:
        """Write into a checkpoint what the next step needs besides the backend's state, and `sync`."""

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote."""


def is_finished(training: Steps[Any]) -> bool:
    """Return whether all steps are done."""
    return training.progress.step >= training.steps


@dataclass(frozen=True)
class Training:
    """The state of a training in the loop.

    Attributes:
        examples: the training examples.
        objective: the criterion's options, for the metrics.
        progress: updated by each step; saved in checkpoints.
        logging_steps: steps per line of metrics.
        dropout: whether there is dropout, whose draws depend on the split of a step; for the message when that changes.
        say: shows a line to the user.
        stopping: shows, from a signal handler, that a stop was asked for.
    """

    passes: Passes
    examples: Sequence[Example]
    schedule: Schedule
    criterion: AnyCriterion
    objective: ResolvedObjective
    progress: Progress
    largest: LargestPass
    logging_steps: int
    dropout: bool
    say: Callable[[str], None]
    stopping: Callable[[str], None] = to_stderr

    @property
    def steps(self) -> int:
        """The number of steps of the whole training."""
        return self.schedule.steps

    def take(self, step: int, tell: Callable[[int, int], None]) -> Taken:
        """Take a step, and remember its largest pass; `tell` is called with the number of its passes, and of those done."""
        taken = take_step(self.passes, self.schedule, step, self.criterion, self.say, self.dropout, tell)
        self.largest.add(taken.batches)
        return taken

    def count(self, taken: Taken, seconds: float) -> dict[str, Any] | None:
        """Count a step as done; return a line of metrics if one is due."""
        figures = add_score_figures if self.criterion.reads == SCORES else add_figures
        count_step(self.progress, taken, seconds, partial(figures, options=self.objective))
        if self.progress.step % self.logging_steps and not is_finished(self):
            return None
        line = line_of(self.progress, self.schedule, self.passes.backend.peak_memory_mb())
        self.progress.window.clear()
        return line

    def explain(self, step: int, taken: Taken, kept: Path | None) -> str:
        """Say why a step that is not finite ended the training."""
        return explain(step, taken, self.examples, self.objective, kept)

    def sync(self) -> None:
        """Wait until the reference cache is on the disk."""
        self.passes.sync()

    def save_state(self, folder: Path) -> None:
        """Wait until the cache is on the disk: recomputed in other batches, log-probs differ in the last bits."""
        self.sync()

    def load_state(self, folder: Path) -> None:
        """Do nothing: a step needs no more than the backend's state."""


def loop(training: Steps[T], observers: Observers, keep: Callable[[], Path], again: str) -> None:
    """Take the remaining steps, or those up to a Ctrl-C; observers hear of everything except the end of a finished training.

    Args:
        keep: saves the last step, if it is not saved, and returns its checkpoint.
        again: the flags that continue the run.

    Raises:
        TrainingDiverged: the loss or its gradient is not finite; the state before that is saved.
        UserError: a step or an evaluation failed, such as for want of memory or by the reward; the last step is saved.
    """
    finite = Finite()
    with _kept(OutOfMemory, training.progress, keep, again), StopSignal(tell=training.stopping) as stop:

        def event(line: dict[str, Any] | None = None) -> Event:
            return Event(training.progress.step, training.steps, line, lambda: stop.asked)

        observers.started(event())
        while not is_finished(training) and not stop.asked:
            began, step = time.perf_counter(), training.progress.step + 1
            with _kept(UserError, training.progress, keep, again):
                taken = training.take(step, partial(observers.within_step, event()))
            if not finite(taken.result):  # the weights are still those after the previous, finite step
                kept = keep() if training.progress.step else None
                raise TrainingDiverged(training.explain(step, taken, kept))
            line = training.count(taken, time.perf_counter() - began)
            observers.after_step(event(line))
        if not is_finished(training):
            observers.stopped(event())


@contextmanager
def _kept(what: type[UserError], progress: Progress, keep: Callable[[], Path], again: str) -> Iterator[None]:
    """If the block raises an error of this type, save the last step and say so in the error."""
    try:
        yield
    except what as error:
        if not progress.step or isinstance(error, DiskFailed):
            raise
        raise UserError(f"{error}. Step {progress.step} is saved: {keep()}; {again} continues from it") from error.__cause__
