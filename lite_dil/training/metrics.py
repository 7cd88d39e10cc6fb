"""Metrics of responses and pairs, in numpy, the same for training and evaluation and for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lite_dil.backends.types import StepResult
from lite_dil.batching.batch import Batch, by_batch
from lite_dil.batching.schedule import Schedule
from lite_dil.objectives.losses import log_ratio
from lite_dil.objectives.options import ResolvedObjective
from lite_dil.objectives.table import constants, objective_of
from lite_dil.runs.progress import Progress
from lite_dil.training.step import Taken

# Counts in the window of a line; everything else in it is a mean.
_SUMS = ("examples", "tokens", "seconds", "steps", "skipped", "clipped", "reference_passes")
_RATIO, _SQUARE, _SHARE = "ratio/mean", "ratio/square", "ratio/effective_share"
_LARGEST = 300.0  # of the exponent of a ratio, whose square is then still finite in float64


class Means:
    """Running means by name, each over its own count: of pairs, of chosen responses, of rejected responses.

    Args:
        state: sums and counts by name, changed in place; checkpoints save it.
    """

    def __init__(self, state: dict[str, list[float]] | None = None) -> None:
        self.state = {} if state is None else state

    def add(self, name: str, values: np.ndarray | float, count: int | None = None) -> None:
        """Add values, or a mean over `count` values."""
        array = np.asarray(values, np.float64)
        number = array.size if count is None else count
        if number:
            entry = self.state.setdefault(name, [0.0, 0.0])
            entry[0] += float(array.sum()) if count is None else float(array) * count
            entry[1] += number

    def total(self, name: str) -> float:
        """Return the sum."""
        return self.state[name][0]

    def means(self) -> dict[str, float]:
        """Return every mean."""
        return {name: total / count for name, (total, count) in self.state.items()}


def answer_metrics(means: Means, policy: np.ndarray, reference: np.ndarray, batch: Batch, options: ResolvedObjective) -> None:
    """Add a batch's metrics under TRL's names; `policy` and `reference` are summed log-probs in nats, (responses,).

    A reward is ``beta * f``, the accuracy is the share of pairs with ``f_w > f_l``, and ``logps/*`` are sums over the
    response's tokens in nats. Unpaired responses have no accuracy; for their margin see `derived`.
    """
    f = log_ratio(policy.astype(np.float64), reference.astype(np.float64), batch.lengths, options.logp_reduction)
    rewards = options.beta * f
    for name, index in (("chosen", batch.chosen), ("rejected", batch.rejected)):
        means.add(f"rewards/{name}", rewards[index])
    first, second = batch.pairs
    means.add("rewards/accuracies", f[first] > f[second])
    means.add("rewards/margins", rewards[first] - rewards[second])
    for name, index in (("chosen", batch.chosen), ("rejected", batch.rejected)):
        means.add(f"logps/{name}", policy[index])
    for name, index in (("chosen", batch.chosen), ("rejected", batch.rejected)):
        means.add(f"log_ratio/{name}", f[index])
    if (capped := objective_of(options.loss).capped) and (compared := capped(f, constants(options.loss, options))):
        value, cap = compared
        means.add("capped", value > cap)
    if is_exponential(options.loss):
        ratio = np.exp(np.minimum(rewards, options.log_ratio_cap or _LARGEST))  # beyond a cap the gradient grows no more
        means.add(_RATIO, ratio)
        means.add(_SQUARE, ratio**2)


def is_exponential(loss: str) -> bool:
    """Return whether the loss grows with r = e^(beta f), so that a few responses with a large f may carry it."""
    return "log_ratio_cap" in objective_of(loss).options


def derived(figures: dict[str, float]) -> dict[str, float]:
    """Return the means with what follows from them.

    The margin of unpaired responses is the difference of the mean rewards. The effective share is ``mean(r)^2 / mean(r^2)``,
    r = e^(beta f), Kish's effective sample size over the sample size: 1 if all responses count alike, 1/n if one of n counts.
    """
    found = dict(figures)
    if "rewards/margins" not in figures and {"rewards/chosen", "rewards/rejected"} <= figures.keys():
        found["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    if (square := found.pop(_SQUARE, None)) is not None:
        found[_SHARE] = found.pop(_RATIO) ** 2 / square
    return found


def add_figures(means: Means, taken: Taken, options: ResolvedObjective) -> None:
    """Add the metrics of a step's log-probs."""
    assert taken.reference is not None  # every objective of a policy has it
    parts = (by_batch(values, taken.batches) for values in (taken.policy, taken.reference))
    for batch, policy, reference in zip(taken.batches, *parts, strict=True):
        answer_metrics(means, policy, reference, batch, options)
    if objective_of(options.loss).baseline:
        means.add("kl", taken.baseline, sum(batch.examples for batch in taken.batches))


def count_work(
    progress: Progress, means: Means, result: StepResult, examples: int, tokens: int, seconds: float, reference_passes: int = 0
) -> None:
    """Add what every step has to the run's progress, and to the window of its next line."""
    progress.step, progress.num_tokens = progress.step + 1, progress.num_tokens + tokens
    means.add("loss", result.loss, examples)
    means.add("grad_norm", result.grad_norm, examples)
    counts = (examples, tokens, seconds, 1, int(result.skipped), int(result.clipped), reference_passes)
    for name, value in zip(_SUMS, counts, strict=True):
        means.add(name, value)


def count_step(progress: Progress, taken: Taken, seconds: float, figures: Callable[[Means, Taken], None]) -> None:
    """Add a step to the run's progress, and to the window of its next line; `figures` adds its metrics."""
    batches, means = taken.batches, Means(progress.window)
    number, tokens = sum(batch.examples for batch in batches), sum(batch.tokens for batch in batches)
    count_work(progress, means, taken.result, number, tokens, seconds, taken.reference_passes)
    figures(means, taken)


def line_of(progress: Progress, schedule: Schedule, peak_memory_mb: float) -> dict[str, Any]:
    """Return the line of metrics for the steps in the window."""
    window = Means(progress.window)
    figures = {name: value for name, value in window.means().items() if name not in _SUMS}
    examples, tokens, seconds, steps, skipped, clipped, passes = map(window.total, _SUMS)
    return {
        "step": progress.step,
        "epoch": schedule.epoch(progress.step),
        **derived(figures),
        "learning_rate": schedule.learning_rate(progress.step),
        "num_tokens": progress.num_tokens,
        "tokens_per_second": tokens / seconds,
        "examples_per_second": examples / seconds,
        "seconds_per_step": seconds / steps,
        "peak_memory_mb": peak_memory_mb,
        "skipped_steps": skipped,
        "clipped_steps": clipped,
        "reference_passes": passes,
    }
