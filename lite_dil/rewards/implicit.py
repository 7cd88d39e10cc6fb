"""Rewards by a trained policy: beta times its log-ratio to the reference, on the base in memory (arXiv 2305.18290, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.generation.scoring import compared_logps
from lite_dil.rewards.source import Answered, by_prompt


class ImplicitReward:
    """beta f of a policy's adapter; a `lite_dil.rewards.source.RewardSource`.

    Args:
        adapter: its name on the backend, whose reference is also the one that it was trained against.
        mean: whether f is averaged over the response's tokens, as in its training, and not summed.
        say: tells the user if memory holds less than a pass.
    """

    def __init__(self, backend: Backend, adapter: str, beta: float, mean: bool, name: str, say: Callable[[str], None]) -> None:
        self._backend, self._adapter, self._beta, self._mean = backend, adapter, beta, mean
        self._name, self._say = name, say

    @property
    def name(self) -> str:
        """Names its metrics."""
        return self._name

    def rewards(self, answers: Sequence[Answered]) -> np.ndarray:
        """Return the reward of each response, float64, (answers,); of one that was cut, that of the tokens it has."""
        found, places = np.zeros(len(answers)), by_prompt(answers)
        responses = [[answers[at].response_ids for at in several] for several in places.values()]
        with self._backend.using(self._adapter):
            logps = compared_logps(self._backend, list(places), responses, self._say)
        of = np.mean if self._mean else np.sum
        for several, compared in zip(places.values(), logps, strict=True):
            found[several] = [self._beta * of(both[:, 0] - both[:, 1], dtype=np.float64) for both in compared]
        return found
