"""One optimiser step, in passes that memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from lite_dil.backends.types import MicroBatch, StepResult
from lite_dil.base.errors import OutOfMemory
from lite_dil.batching.batch import Batch, by_batch
from lite_dil.batching.schedule import Schedule
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.loss import NOTHING, TOKENS
from lite_dil.objectives.reward_criterion import RewardCriterion
from lite_dil.training.passes import Passes

AnyCriterion: TypeAlias = Criterion | RewardCriterion


class Taken(NamedTuple):
    """A finished step: its batches, its result, and the number of reference passes computed.

    `policy` and `reference` are summed log-probs, (responses,), in the order of the batches; `baseline` is kto's z0. For a
    reward model `policy` holds the scores, (responses, outputs), and there is no reference.
    """

    batches: list[Batch]
    result: StepResult
    policy: np.ndarray
    reference: np.ndarray | None
    baseline: float
    reference_passes: int


def micro_batches(
    batches: Sequence[Batch],
    criterion: AnyCriterion,
    references: Sequence[np.ndarray | None] | None = None,
    baseline: float = 0.0,
) -> list[MicroBatch]:
    """Return the passes of a step with the criterion's inputs, and the reference's summed log-probs if they are known."""
    known = references or [None] * len(batches)
    return [MicroBatch(batch, criterion.inputs(batch, baseline), of) for batch, of in zip(batches, known, strict=True)]


def take_step(
    passes: Passes,
    schedule: Schedule,
    step: int,
    criterion: AnyCriterion,
    say: Callable[[str], None],
    dropout: bool,
    tell: Callable[[int, int], None] = lambda passes, done: None,
) -> Taken:
    """Take step 1, 2, ... in passes that memory holds: if one does not fit, `schedule` plans smaller ones from then on.

    `tell` is called after each pass with the number of passes in the step, and of those done.

    Raises OutOfMemory if the failed pass cannot be split; backend and schedule are then unchanged.
    """
    while True:
        batches = schedule.batches(step)
        compared = criterion.reference != NOTHING
        known = [passes.cache.lookup(batch) if compared else None for batch in batches]
        baseline = passes.baseline(schedule.others(step))
        try:
            work = micro_batches(batches, criterion, known, baseline)
            rate = schedule.learning_rate(step)
            result = passes.backend.step(work, criterion, rate, count=partial(tell, len(work)))
        except OutOfMemory as error:
            failed = None if error.micro_batch is None else batches[error.micro_batch]
            before = schedule.limits
            if not schedule.halve([failed] if failed else batches):
                raise
            say(
                f"out of memory in step {step}: passes of at most {schedule.limits} from here on (were {before}); the result "
                f"is the same{', except for what dropout draws' if dropout else ''}"
            )
            continue
        computed = [] if result.reference is None else by_batch(result.reference, batches)
        missing = [(batch, logps) for batch, logps, have in zip(batches, computed, known, strict=False) if have is None]
        for batch, logps in missing:
            passes.remember(batch, logps)
        return Taken(batches, result, _sums(result.policy, batches, criterion), result.reference, baseline, len(missing))


def _sums(policy: np.ndarray, batches: Sequence[Batch], criterion: AnyCriterion) -> np.ndarray:
    """Return the policy's summed log-probs, also if the objective reads token log-probs; scores as they are."""
    if criterion.reads != TOKENS:
        return policy
    parts = np.split(policy, np.cumsum([int(batch.lengths.sum()) for batch in batches])[:-1])
    return np.concatenate([batch.sums(values) for batch, values in zip(batches, parts, strict=True)])
