"""On-policy training: draw groups, credit their answers, and take one step or more on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import MicroBatch, StepResult
from lite_dil.base.errors import OutOfMemory
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import LargestPass, batch_tokens, row_tokens
from lite_dil.data.encoder import Example
from lite_dil.generation.scoring import token_logps
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.loss import Loss
from lite_dil.objectives.options import ResolvedObjective
from lite_dil.objectives.table import ONLINE
from lite_dil.online.credit import Spread, equal_groups, moved_kl
from lite_dil.online.groups import DrawnGroups, GroupSampler
from lite_dil.online.kept_answers import read_answers, write_answers
from lite_dil.online.loss import Surrogate
from lite_dil.online.metrics import answer_metrics, ratio_metrics
from lite_dil.online.options import K3, RUNNING
from lite_dil.online.updates import advantages_of, answer_passes, batches_of, loss_of, pair_passes
from lite_dil.runs.progress import Progress
from lite_dil.training.metrics import Means, count_work, line_of

_Work = tuple[Loss, list[MicroBatch]]


@dataclass(frozen=True)
class TakenOnline:
    """A finished step.

    Attributes:
        update: how many steps were taken on the same answers before.
        advantages: (groups, K), of r - beta f, or of r where the KL is in the loss.
        spread: of all rewards so far.
        skipped: groups that contributed no gradient.
        loss, work: the step's loss and passes; no passes where no group has a gradient.
        result: with a gradient norm of 0 where no group did, and the optimiser took no step.
        too_far: whether --target-kl ends the training with this step.
    """

    step: int
    update: int
    drawn: DrawnGroups
    advantages: np.ndarray
    spread: Spread
    skipped: int
    loss: Loss
    work: list[MicroBatch]
    result: StepResult
    too_far: bool = False


class OnlineTraining:
    """The state of an on-policy training in the loop, a `lite_dil.training.loop.Steps`.

    Args:
        target_kl: the training ends when the policy's KL from its reference, in nats an answer, is above it before a step;
            None for no limit.

    Attributes:
        last: the step taken last.
        largest: the largest pass of all steps.
    """

    def __init__(
        self,
        backend: Backend,
        sampler: GroupSampler,
        objective: ResolvedObjective,
        progress: Progress,
        logging_steps: int,
        target_kl: float | None,
        say: Callable[[str], None],
        stopping: Callable[[str], None],
    ) -> None:
        self.backend, self.sampler, self.objective, self.progress = backend, sampler, objective, progress
        self.schedule, self.stopping = sampler.schedule, stopping
        self.largest = LargestPass(backend.layout)
        self.last: TakenOnline | None = None
        self._logging_steps, self._target_kl, self._say = logging_steps, target_kl, say
        self._pairs = None if objective.loss in ONLINE else Criterion(objective, [Example((), ((), ()), (CHOSEN, REJECTED))])

    @property
    def steps(self) -> int:
        """The number of steps of the whole training; those done if the target KL ended it."""
        return self.progress.step if self.progress.ended else self.schedule.steps

    def take(self, step: int, tell: Callable[[int, int], None]) -> TakenOnline:
        """Take a step; the last one, without an update, if the policy is too far from its reference."""
        drawn = self.sampler.draw(step)
        update, spread = step - self.schedule.first(step), Spread.of(self.progress.reward_spread)
        too_far = self._target_kl is not None and self._too_far(drawn, step, update, self._target_kl)
        if not update:
            spread = spread.including(drawn.rewards)
        advantages = advantages_of(drawn, self.sampler.options, self.objective.beta, spread)
        used = np.flatnonzero(self._useful(drawn, advantages, update) & (not too_far))
        skipped = len(drawn.groups) - len(used)
        loss, work, result = self._update(drawn, advantages, used, step, tell)
        self.largest.add(batches_of(work))
        self.last = TakenOnline(step, update, drawn, advantages, spread, skipped, loss, work, result, too_far)
        return self.last

    def _too_far(self, drawn: DrawnGroups, step: int, update: int, most: float) -> bool:
        """Return whether the policy is further than `most` from its reference, and say so.

        After an update on the same answers these are no longer the policy's own, so it is weighed how likely they are by now.
        """
        what, distance = "mean log-ratio of the answers", float(drawn.log_ratios.mean())
        if update:
            what, distance = "KL from the reference", moved_kl(self._moved(drawn), drawn.log_ratios)
        if distance <= most:
            return False
        self._say(
            f"the {what} is {distance:.3g} nats, above --target-kl {most:g}: the training ends with step {step}, which "
            "changes nothing"
        )
        return True

    def _moved(self, drawn: DrawnGroups) -> np.ndarray:
        """Return log(pi / pi_old) of each answer, (groups, K) float64, by passes without gradients."""
        prompts = [group.prompt.ids for group in drawn.groups]
        answers = [[one.ids for one in group.rollouts] for group in drawn.groups]
        now = token_logps(self.backend, prompts, answers, self._say, row_tokens(self.schedule.options))
        return np.array(
            [
                [np.sum(new - one.logps, dtype=np.float64) for new, one in zip(several, group.rollouts, strict=True)]
                for several, group in zip(now, drawn.groups, strict=True)
            ]
        )

    def _useful(self, drawn: DrawnGroups, advantages: np.ndarray, update: int) -> np.ndarray:
        """Return whether each group has a gradient, (groups,)."""
        if self._pairs is not None:
            return ~equal_groups(drawn.rewards)
        found = advantages.any(1)
        if self.sampler.options.kl_estimator == K3:
            moved = [any((one.logps != one.reference_logps).any() for one in group.rollouts) for group in drawn.groups]
            found = np.asarray(found | np.array(moved))
            if update:  # the others have moved the policy, also on this group's answers
                found[:] = found.any()
        return np.asarray(found)

    def count(self, taken: TakenOnline, seconds: float) -> dict[str, Any] | None:
        """Count a step as done; return a line of metrics if one is due."""
        groups = taken.drawn.groups
        tokens = sum(len(group.prompt.ids) + len(one.ids) for group in groups for one in group.rollouts)
        means = Means(self.progress.window)
        count_work(self.progress, means, taken.result, len(groups), tokens, seconds)
        self.progress.ended = taken.too_far
        if self.sampler.options.reward_scale == RUNNING:
            self.progress.reward_spread = taken.spread.state
            means.add("reward_scale", taken.spread.deviation)
        answer_metrics(means, taken.drawn, self.objective.beta, taken.skipped, taken.drawn.refilled * (not taken.update))
        if taken.work and isinstance(taken.loss, Surrogate) and (epsilon := self.sampler.options.epsilon):
            ratio_metrics(means, taken.work, taken.result.policy, epsilon)
        if self.progress.step % self._logging_steps and self.progress.step < self.steps:
            return None
        line = line_of(self.progress, self.schedule, self.backend.peak_memory_mb())
        line |= {name: means.total(name) for name in ("skipped_groups", "refilled_groups")}
        del line["reference_passes"]
        self.progress.window.clear()
        return line

    def explain(self, step: int, taken: TakenOnline, kept: Path | None) -> str:
        """Say why a step that is not finite ended the training."""
        ratios = np.abs(taken.drawn.log_ratios)
        saved = f"The last good checkpoint is {kept}" if kept else "No checkpoint had been saved: this was the first step"
        return (
            f"step {step}: loss {taken.result.loss:g}, gradient norm {taken.result.grad_norm:g}, largest log-ratio of an "
            f"answer {ratios.max():.3g} nats. The weights were left as they were before the step. What helps: a lower "
            f"--learning-rate; a larger --beta; --target-kl. {saved}"
        )

    def sync(self) -> None:
        """Do nothing: no part of it is kept outside of the run."""

    def save_state(self, folder: Path) -> None:
        """Write the answers on which further steps are to be taken."""
        step = self.progress.step
        if step and self.schedule.first(step + 1) <= step:
            write_answers(folder, self.sampler.draw(step))

    def load_state(self, folder: Path) -> None:
        """Read the answers on which further steps are to be taken."""
        step = self.progress.step
        if self.schedule.first(step + 1) <= step:
            self.sampler.keep(step, read_answers(folder, self.sampler, self.sampler.asked(step)))

    def _update(
        self, drawn: DrawnGroups, advantages: np.ndarray, used: np.ndarray, step: int, tell: Callable[[int, int], None]
    ) -> tuple[Loss, list[MicroBatch], StepResult]:
        """Take the optimiser's step in passes that memory holds; none if no group has a gradient."""
        rate, update = self.schedule.learning_rate(step), step - self.schedule.first(step)
        while True:
            loss, work = self._work(drawn, advantages, used, update)
            if not work:  # not even a weight decay, which would move the policy
                return loss, [], StepResult(0.0, 0.0, np.zeros(0, np.float32), None)
            try:
                return loss, work, self.backend.step(work, loss, rate, count=partial(tell, len(work)))
            except OutOfMemory as error:
                failed = batches_of(work if error.micro_batch is None else [work[error.micro_batch]])
                if not self._halve(failed):
                    raise
                self._say(f"out of memory in step {step}: passes of at most {self.schedule.limits} from here on")

    def _work(self, drawn: DrawnGroups, advantages: np.ndarray, used: np.ndarray, update: int) -> _Work:
        """Return the loss and the passes of a step."""
        layout, limits = self.backend.layout, self.schedule.limits
        if self._pairs is not None:
            return self._pairs, pair_passes(drawn, used, self._pairs, layout, limits)
        loss = loss_of(self.sampler.options, update)
        return loss, answer_passes(drawn, used, advantages, loss, self.objective.beta, layout, limits)

    def _halve(self, batches: Sequence[Batch]) -> bool:
        """Plan passes of at most half of the largest of `batches` from now on; return False if that cannot be split."""
        largest = max(batches, key=lambda batch: batch_tokens(batch, self.backend.layout))
        if self._pairs is not None or largest.examples > 1:
            return self.schedule.halve(batches)
        if len(largest.responses) == 1:
            return False
        limits = self.schedule.limits
        self.schedule.limits = limits._replace(tokens=batch_tokens(largest, self.backend.layout) - 1)
        return True
