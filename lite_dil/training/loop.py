"""The training loop: one for every backend and every objective."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.schedule.steps

    def remaining_steps(self, stop: StopSignal) -> Iterator[int]:
        """Yield the number of each remaining step, until none is left or a stop is requested."""
        while not self.finished and not stop.asked:
            yield self.progress.step + 1

    def take(self, step: int, tell: Callable[[int, int], None]) -> Taken:
        """Take a step, and remember its largest pass; `tell` is called with the number of its passes, and of those done."""
        taken = take_step(self.passes, self.schedule, step, self.criterion, self.say, self.dropout, tell)
        self.largest.add(taken.batches)
        return taken

    def count(self, taken: Taken, seconds: float) -> dict[str, Any] | None:
        """Count a step as done; return a line of metrics if one is due."""
        figures = add_score_figures if self.criterion.reads == SCORES else add_figures
        count_step(self.progress, taken, seconds, partial(figures, options=self.objective))
        if self.progress.step % self.logging_steps and not self.finished:
            return None
        line = line_of(self.progress, self.schedule, self.passes.backend.peak_memory_mb())
        self.progress.window.clear()
        return line

    def event(self, stop: StopSignal, line: dict[str, Any] | None = None) -> Event:
        """Return the event for observers."""
        return Event(self.progress.step, self.schedule.steps, line, lambda: stop.asked)


def loop(training: Training, observers: Observers, keep: Callable[[], Path], again: str) -> None:
    """Take the remaining steps, or those up to a Ctrl-C; observers hear of everything except the end of a finished training.

    Args:
        keep: saves the last step, if it is not saved, and returns its checkpoint.
        again: the flags that continue the run.

    Raises:
        TrainingDiverged: the loss or its gradient is not finite; the state before that is saved.
        UserError: memory does not hold a step or an evaluation; the last step is saved.
    """
    finite = Finite()
    with _kept_where_memory_ends(training.progress, keep, again), StopSignal(tell=training.stopping) as stop:
        observers.started(training.event(stop))
        for step in training.remaining_steps(stop):
            began = time.perf_counter()
            taken = training.take(step, partial(observers.within_step, training.event(stop)))
            if not finite(taken.result):  # the weights are still those after the previous, finite step
                kept = keep() if training.progress.step else None
                raise TrainingDiverged(explain(step, taken, training.examples, training.objective, kept))
            line = training.count(taken, time.perf_counter() - began)
            observers.after_step(training.event(stop, line))
        if not training.finished:
            observers.stopped(training.event(stop))


@contextmanager
def _kept_where_memory_ends(progress: Progress, keep: Callable[[], Path], again: str) -> Iterator[None]:
    """If memory runs out in the block, save the last step and say so in the error."""
    try:
        yield
    except OutOfMemory as error:
        if not progress.step:
            raise
        checkpoint = keep()
        raise UserError(f"{error}. Step {progress.step} is saved: {checkpoint}; {again} continues from it") from None
