"""A weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.rewards.source import Answered, RewardSource

LARGEST_REWARD = 1e18  # whose square is a float32


class Rewarded(NamedTuple):
    """Rewards of responses: each source's own by name, and their weighted sum; each (answers,), float64."""

    parts: dict[str, np.ndarray]
    total: np.ndarray


class TotalReward:
    """The weighted sum of several sources' rewards.

    Args:
        cut_penalty: subtracted from the reward of a response that was cut before its end, as in TRL.
    """

    def __init__(self, sources: Sequence[tuple[RewardSource, float]], cut_penalty: float = 0.0) -> None:
        self.sources, self.cut_penalty = list(sources), cut_penalty

    def __call__(self, answers: Sequence[Answered]) -> Rewarded:
        """Return the rewards. Raises UserError for a source's wrong number of them, or one that is not finite."""
        parts, total = dict[str, np.ndarray](), np.zeros(len(answers))
        for source, weight in self.sources:
            found = source.rewards(answers)
            if found.shape != (len(answers),):
                raise UserError(f"--reward {source.name} returned {found.shape} rewards for {len(answers)} responses")
            for wrong in np.flatnonzero(~np.isfinite(found)).tolist():
                raise UserError(f"--reward {source.name} is {found[wrong]} for {answers[wrong].place}")
            parts[source.name] = found
            with np.errstate(over="ignore", invalid="ignore"):  # refused below
                total += weight * found
        total -= self.cut_penalty * np.array([not each.ended for each in answers])
        for wrong in np.flatnonzero(~(np.abs(total) < LARGEST_REWARD)).tolist():
            raise UserError(
                f"--reward: the weighted sum is {total[wrong]:.3g} for {answers[wrong].place}; give smaller weights, since "
                f"training in float32 takes less than {LARGEST_REWARD:g}"
            )
        return Rewarded(parts, total)
