"""Figures of a policy on held-out data, and the observer that measures them during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from lite_dil.backends import registry
from lite_dil.backends.types import never
from lite_dil.base.display import Tell, TimeLeft, unheard
from lite_dil.base.observer import Event, Observer
from lite_dil.batching.options import ScheduleOptions
from lite_dil.batching.schedule import plan, row_tokens
from lite_dil.data.encoder import Example
from lite_dil.data.mismatched import mismatched
from lite_dil.evaluation.pairs import PairFigures
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.loss import TOKENS
from lite_dil.objectives.losses import log_ratio
from lite_dil.objectives.options import ResolvedObjective
from lite_dil.objectives.own import OwnLoss
from lite_dil.objectives.table import objective_of
from lite_dil.training.metrics import Means, answer_metrics, derived
from lite_dil.training.passes import Passes


class HeldOut:
    """Held-out examples in batches; the reference's log-probs come from the cache once they are known.

    Args:
        passes: the passes of the policy to measure.
        options: the objective whose loss and figures are computed.
        sizes: limits on the size of a batch.
        own: the objective, if the options name a program's own.

    Attributes:
        pairs: what the last complete `run` found of each pair.
    """

    def __init__(
        self,
        passes: Passes,
        examples: Sequence[Example],
        options: ResolvedObjective,
        sizes: ScheduleOptions,
        own: OwnLoss | None = None,
    ) -> None:
        self.passes, self.options, self._own = passes, options, own is not None
        self.pairs = PairFigures(options.beta)
        self.criterion = Criterion(options, examples, own)
        others = mismatched(examples, options.loss, sizes.max_length) if objective_of(options.loss).baseline else []
        self.batches, self.others = (
            plan(part, passes.backend.layout, sizes.batch_size, row_tokens(sizes)) for part in (examples, others)
        )

    def run(self, stop: Callable[[], bool] = never, tell: Tell = unheard) -> dict[str, float]:
        """Return the metrics with the prefix ``eval_``; none if `stop`, called between passes, ended it.

        `tell` is called with the time left.
        """
        means, pairs, left = Means(), PairFigures(self.options.beta), TimeLeft(tell, len(self.batches))
        baseline = self.passes.baseline(self.others, stop)
        for batch in self.batches:
            if stop():
                return {}
            reference = self.passes.reference(batch)
            tokens = self.criterion.reads == TOKENS
            policy = self.passes.token_logps(batch) if tokens else self.passes.sequence_logps(batch)
            loss = self._loss(policy, reference, self.criterion.inputs(batch, baseline))
            means.add("loss", loss / batch.examples, batch.examples)
            sums = batch.sums(policy) if tokens else policy
            answer_metrics(means, sums, reference, batch, self.options)
            f = log_ratio(sums.astype(np.float64), reference.astype(np.float64), batch.lengths, self.options.logp_reduction)
            pairs.add(f, batch)
            left.add()
        if self.others:
            means.add("kl", baseline)
        self.pairs = pairs
        return {f"eval_{name}": value for name, value in derived(means.means()).items()}

    def _loss(self, policy: np.ndarray, reference: np.ndarray, inputs: dict[str, np.ndarray]) -> float:
        """Return the criterion's sum over a batch."""
        if self._own:  # which may support only the backend's arrays
            return float(registry.value_and_slope(self.passes.backend.name, self.criterion, policy, reference, inputs)[0])
        with np.errstate(over="ignore"):  # an overflow shows as a non-finite loss
            return float(self.criterion(policy, reference, inputs))


class HeldOutData(Protocol):
    """Held-out data that can be measured.

    Attributes:
        pairs: what the last complete `run` found of each pair.
    """

    pairs: PairFigures

    def run(self, stop: Callable[[], bool] = never, tell: Tell = unheard) -> dict[str, float]:
        """Return the metrics with the prefix ``eval_``; none if `stop`, called between passes, ended it."""


class Evaluation(Observer):
    """Measures held-out data every ``--eval-steps`` and at the end, and logs one line of metrics.

    Args:
        every: steps between evaluations; None evaluates at the end only.
        epoch: returns how many epochs are done after a step.
        logged: lines of metrics that a resumed training already has.
        takers: called with the line.
        doing: shows a text during its block, and what is told in it.
        say: shows a line to the user.
    """

    def __init__(
        self,
        held_out: HeldOutData,
        every: int | None,
        epoch: Callable[[int], float],
        logged: Sequence[dict[str, Any]],
        takers: Sequence[Callable[[dict[str, Any]], None]],
        doing: Callable[[str], AbstractContextManager[Tell]],
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self.held_out, self.every, self.epoch, self._takers, self._doing = held_out, every, epoch, takers, doing
        self._logged = {line["step"] for line in logged if "eval_loss" in line}

    def started(self, event: Event) -> None:
        """Evaluate the step at which a training was stopped or killed, if that evaluation was due and is missing."""
        if event.step not in self._logged:
            self.after_step(event)

    def after_step(self, event: Event) -> None:
        """Evaluate if it is due."""
        if not event.due(self.every):
            return
        with self._doing("" if event.stop() else "evaluating") as tell:
            found = self.held_out.run(event.stop, tell)
        self.left_out = self.left_out or not found
        if bad := [name for name, value in found.items() if not math.isfinite(value)]:
            self._say(f"warning: held-out figures of step {event.step} are not finite: {', '.join(bad)}; training diverges")
        for take in self._takers if found else ():
            take({"step": event.step, "epoch": self.epoch(event.step), **found})
