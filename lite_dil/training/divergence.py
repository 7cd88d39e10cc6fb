"""Detect a training that diverges, and say where and what helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lite_dil.backends.types import StepResult
from lite_dil.base.signs import CHOSEN
from lite_dil.batching.batch import by_batch
from lite_dil.data.encoder import Example
from lite_dil.objectives.losses import log_ratio
from lite_dil.objectives.options import ResolvedObjective
from lite_dil.objectives.reward_table import identity
from lite_dil.objectives.table import objective_of
from lite_dil.training.step import Taken

# float16's loss scale halves with each skipped step: after this many, the scale is not the cause.
MAX_SKIPPED = 25


class Finite:
    """Checks each step of a training in order."""

    def __init__(self) -> None:
        self._skipped = 0  # consecutive steps

    def __call__(self, result: StepResult) -> bool:
        """Return whether the step's loss and gradient are finite, and not too many steps in a row were skipped."""
        self._skipped = self._skipped + 1 if result.skipped else 0
        return math.isfinite(result.loss) and math.isfinite(result.grad_norm) and self._skipped < MAX_SKIPPED


def explain(step: int, taken: Taken, examples: Sequence[Example], options: ResolvedObjective, checkpoint: Path | None) -> str:
    """Return a message: the loss, the example with the most extreme log-ratio, what helps, and the last good checkpoint."""
    place, values = _farthest(taken, options.logp_reduction)
    what = (
        f"log-ratio {values} ({options.logp_reduction} over its tokens, in nats)"
        if taken.reference is not None
        else f"score {values}"
    )
    index = next(i for i, example in enumerate(examples) if example.place == place)
    kept = f"The last good checkpoint is {checkpoint}"
    if checkpoint is None:
        kept = "No checkpoint had been saved: this was the first step"
    return (
        f"step {step}: loss {taken.result.loss:g}, gradient norm {taken.result.grad_norm:g}. Farthest off is example "
        f"{index + 1} of the data ({place}), with {what}. The weights were left as they were before the step. What helps: "
        f"{'; '.join(what_helps(options.loss, options.logp_reduction, options.log_ratio_cap))}. {kept}"
    )


def _farthest(taken: Taken, reduction: str) -> tuple[str, str]:
    """Return the place and log-ratios, or scores, of the example where one is not finite or, failing that, farthest from 0."""
    worst, reference = (-1.0, "", ""), taken.reference
    policies = by_batch(taken.policy, taken.batches)
    references = [None] * len(taken.batches) if reference is None else by_batch(reference, taken.batches)
    for batch, policy, compared in zip(taken.batches, policies, references, strict=True):
        f = policy[:, 0] if compared is None else log_ratio(policy, compared, batch.lengths, reduction)
        for number, place in enumerate(batch.places):
            here = batch.prompt_of == number
            size = float(np.abs(f[here]).max()) if np.isfinite(f[here]).all() else math.inf
            if size > worst[0]:
                sides = {CHOSEN: "chosen", -CHOSEN: "rejected"}
                ratios = [f"{value:.3g} {sides[sign]}" for value, sign in zip(f[here], batch.signs[here], strict=True)]
                worst = (size, place, ", ".join(ratios))
    return worst[1], worst[2]


def what_helps(loss: str, reduction: str, cap: float | None) -> list[str]:
    """Return what to try when a training runs away: its options' values are given, and the nearest remedy comes first."""
    objective = objective_of(loss)
    advice = ["a lower --learning-rate"]
    if reduction == "sum" and objective.reduction == "mean":
        advice.append("--logp-reduction mean")
    if "log_ratio_cap" in objective.options and cap is None:
        advice.append("--log-ratio-cap 3, or --loss rulsif, which is bounded")
    if loss in map(identity, ("lsif", "ukl")):
        advice.append("a lower --log-ratio-cap, or --reward-loss bce, whose gradient is bounded")
    return advice
