"""Metrics of a reward model's scores, in numpy, under TRL's names where it has one."""

from __future__ import annotations

import numpy as np

from lite_dil.batching.batch import Batch, by_batch
from lite_dil.objectives.options import ResolvedObjective
from lite_dil.objectives.table import constants, objective_of
from lite_dil.training.metrics import Means
from lite_dil.training.step import Taken


def score_metrics(means: Means, scores: np.ndarray, batch: Batch, options: ResolvedObjective) -> None:
    """Add a batch's metrics; `scores` are the head's outputs, (responses, outputs).

    `accuracy` is the share of pairs whose chosen response has the higher reward, `margin` the mean difference, and
    `mean_reward` the mean over all responses. `log_v` is the mean log of the noise scale, if the head has one.
    """
    rewards = scores[:, 0].astype(np.float64)
    means.add("mean_reward", rewards)
    for name, index in (("chosen", batch.chosen), ("rejected", batch.rejected)):
        means.add(f"reward/{name}", rewards[index])
    first, second = batch.pairs
    means.add("accuracy", rewards[first] > rewards[second])
    means.add("margin", rewards[first] - rewards[second])
    if scores.shape[1] > 1:
        means.add("log_v", scores[:, 1])
    if (capped := objective_of(options.loss).capped) and (compared := capped(rewards, constants(options.loss, options))):
        value, cap = compared
        means.add("capped", value > cap)


def add_score_figures(means: Means, taken: Taken, options: ResolvedObjective) -> None:
    """Add the metrics of a step's scores, and the lowest and the highest of them."""
    for batch, scores in zip(taken.batches, by_batch(taken.policy, taken.batches), strict=True):
        score_metrics(means, scores, batch, options)
    means.add("min_reward", float(taken.policy[:, 0].min()))
    means.add("max_reward", float(taken.policy[:, 0].max()))


def by_length(rewards: np.ndarray, tokens: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Return how much of a reward length alone would give; a reward model that goes by length is fooled by it.

    Args:
        rewards, tokens: of each response, (responses,).
        pairs: indices of the chosen and of the rejected response of every pair.

    Returns:
        `length_correlation`, Pearson's, of rewards with tokens, left out where one of the two does not vary; and
        `longer_accuracy`, that of "the longer response is better", equal lengths counting half, left out without pairs.
    """
    found, (first, second) = {}, pairs
    if len(rewards) > 1 and rewards.std() > 0 and tokens.std() > 0:
        found["length_correlation"] = float(np.corrcoef(rewards, tokens)[0, 1])
    if len(first):
        longer = np.sign(tokens[first] - tokens[second])
        found["longer_accuracy"] = float(((longer + 1) / 2).mean())
    return found
