"""The credit of each answer in a group, for J = E[r - beta f]: pure functions of float64 arrays.

f = log pi(y|x) - log pi_ref(y|x) of a whole answer is k1, the plain estimate of KL(pi, pi_ref). It belongs to the reward: a
gradient through k1 as a loss has expectation 0, and one through k3 is that of the forward KL (tests/online/test_tabular.py).
"""

from __future__ import annotations

import numpy as np


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
