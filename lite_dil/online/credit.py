"""The credit of each answer in a group, for J = E[r - beta f]: pure functions of float64 arrays.

f = log pi(y|x) - log pi_ref(y|x) of a whole answer is k1, the plain estimate of KL(pi, pi_ref). It belongs to the reward: a
gradient through k1 as a loss has expectation 0, and one through k3 is that of the forward KL (tests/online/test_tabular.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

_SMALL = 1e-4  # of TRL: keeps a group of equal rewards from division by 0


@dataclass(frozen=True)
class Spread:
    """The count, mean and sum of squared deviations of all rewards so far, in float64."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, state: Sequence[float]) -> Spread:
        """Return it from `state`; from an empty one, of no rewards."""
        return cls(int(state[0]), state[1], state[2]) if state else cls()

    @property
    def state(self) -> list[float]:
        """Numbers that `of` takes."""
        return list(astuple(self))

    def including(self, rewards: np.ndarray) -> Spread:
        """Return it with further rewards (Chan, Golub and LeVeque 1979)."""
        first = rewards.flat[0]
        above = rewards - first  # so that equal rewards have a deviation of exactly 0
        mean, count = float(first + above.mean()), self.count + rewards.size
        apart = mean - self.mean
        squares = float(((above - above.mean()) ** 2).sum()) + apart**2 * self.count * rewards.size / count
        return Spread(count, self.mean + apart * (rewards.size / count), self.squares + squares)

    @property
    def deviation(self) -> float:
        """The standard deviation, and 1 where it is 0, since equal rewards need no scale."""
        return float(np.sqrt(self.squares / (self.count - 1))) if self.count > 1 and self.squares > 0 else 1.0


def by_group(rewards: np.ndarray) -> np.ndarray:
    """Return the rewards, (groups, K), over their group's standard deviation, as TRL's ``scale_rewards="group"`` takes it.

    Answers whose group differs little count more then, so that the gradient is no longer that of J.
    """
    return rewards / (rewards.std(1, ddof=1, keepdims=True) + _SMALL)


def regularised(rewards: np.ndarray, log_ratios: np.ndarray, beta: float) -> np.ndarray:
    """Return r - beta f of each answer, in units of the reward. The log-ratios are sums over tokens, in nats."""
    return rewards - beta * log_ratios


def leave_one_out(values: np.ndarray) -> np.ndarray:
    """Return the advantages of each group's answers: the value minus the mean of the other answers' values.

    Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740 (RLOO). The siblings' mean does not depend on the answer, so that
    ``E[(1/K) sum_i A_i grad log pi(y_i)]`` is exactly grad J. Equal values have advantages of exactly 0. They are not
    divided by the group's deviation, which would turn the gradient.

    Args:
        values: (groups, K), K at least 2.
    """
    # Relative to the first one, since the rounded mean of equal values may differ from them.
    above = values - values[:, :1]
    return above - (above.sum(1, keepdims=True) - above) / (values.shape[1] - 1)


def equal_groups(rewards: np.ndarray) -> np.ndarray:
    """Return whether all answers of a group have the same reward, (groups,); rewards are (groups, K)."""
    return np.asarray((rewards == rewards[:, :1]).all(1))


def best_and_worst(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of each group's best and worst answer, each (groups,); the first of equals."""
    return rewards.argmax(1), rewards.argmin(1)


def moved_kl(moved: np.ndarray, log_ratios: np.ndarray) -> float:
    """Return an estimate of KL(pi, pi_ref) in nats an answer, from answers that an earlier policy pi_old drew.

    The mean of ``w (log(pi / pi_ref) - 1) + pi_ref / pi_old``, w = pi / pi_old: w and pi_ref / pi_old have the mean 1, so that
    the expectation is the KL; no term is below 0, also where pi has left the answers and w is about 0.

    Args:
        moved: log(pi / pi_old) of each answer, float64.
        log_ratios: log(pi_old / pi_ref) of each answer, float64, of the same shape.
    """
    with np.errstate(over="ignore"):  # infinite where pi is e^709 times as likely to give an answer
        return float((np.exp(moved) * (moved + log_ratios - 1) + np.exp(-log_ratios)).mean())
