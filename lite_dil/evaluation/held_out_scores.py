"""Figures of a reward model on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from lite_dil.backends.types import POLICY, never
from lite_dil.base.display import Tell, TimeLeft, unheard
from lite_dil.batching.options import ScheduleOptions
from lite_dil.batching.schedule import plan, row_tokens
from lite_dil.data.encoder import Example
from lite_dil.evaluation.pairs import PairFigures
from lite_dil.objectives.options import ResolvedObjective
from lite_dil.objectives.reward_criterion import RewardCriterion
from lite_dil.training.metrics import Means
from lite_dil.training.passes import Passes
from lite_dil.training.reward_metrics import by_length, score_metrics


class HeldOutScores:
    """Held-out examples in batches, scored by the adapter in training.

    Args:
        passes: the passes of the reward model to measure.
        options: the loss whose value and figures are computed.
        sizes: limits on the size of a batch.

    Attributes:
        pairs: what the last complete `run` found of each pair.
    """

    def __init__(
        self, passes: Passes, examples: Sequence[Example], options: ResolvedObjective, sizes: ScheduleOptions
    ) -> None:
        self.passes, self.options, self.pairs = passes, options, PairFigures()
        self.criterion = RewardCriterion(options, examples)
        self.batches = plan(examples, passes.backend.layout, sizes.batch_size, row_tokens(sizes))

    def run(self, stop: Callable[[], bool] = never, tell: Tell = unheard) -> dict[str, float]:
        """Return the metrics with the prefix ``eval_``, and what length alone would give; none if `stop` ended it.

        `tell` is called with the time left.
        """
        means, pairs, left = Means(), PairFigures(), TimeLeft(tell, len(self.batches))
        rewards, tokens = list[np.ndarray](), list[np.ndarray]()
        for batch in self.batches:
            if stop():
                return {}
            scores = self.passes.run(partial(self.passes.backend.scores, adapter=POLICY), batch)
            with np.errstate(over="ignore"):  # an overflow shows as a non-finite loss
                loss = float(self.criterion(scores, None, self.criterion.inputs(batch)))
            means.add("loss", loss / batch.examples, batch.examples)
            score_metrics(means, scores, batch, self.options)
            pairs.add(scores[:, 0].astype(np.float64), batch)
            rewards.append(scores[:, 0].astype(np.float64))
            tokens.append(np.asarray(batch.lengths, np.float64))
            left.add()
        self.pairs = pairs
        found = means.means() | {"min_reward": float(np.concatenate(rewards).min())}
        found |= {"max_reward": float(np.concatenate(rewards).max()), **self._by_length(rewards, tokens)}
        return {f"eval_{name}": value for name, value in found.items()}

    def _by_length(self, rewards: list[np.ndarray], tokens: list[np.ndarray]) -> dict[str, float]:
        starts = np.cumsum([0, *map(len, rewards[:-1])])
        first, second = zip(*(batch.pairs for batch in self.batches), strict=True)
        sides = (np.concatenate([at + start for at, start in zip(side, starts, strict=True)]) for side in (first, second))
        chosen, rejected = sides
        return by_length(np.concatenate(rewards), np.concatenate(tokens), (chosen, rejected))
