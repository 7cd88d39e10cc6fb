"""Which pairs a step takes, and at what learning rate: pure functions of the step, so a resumed run needs no more than it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lite_dil.batch import Batch
from lite_dil.config import TrainConfig
from lite_dil.examples import Example


class Schedule:
    """The plan of a run over `examples`: each epoch a new order, drawn from the seed; a short last batch is taken as it is."""

    def __init__(self, config: TrainConfig, examples: Sequence[Example]) -> None:
        self.config, self.examples = config, examples
        self.pairs_per_step = config.batch_size * config.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(examples) / self.pairs_per_step)
        self.steps = config.max_steps or math.ceil(config.epochs * self.steps_per_epoch)
        self._order = lru_cache(1)(self._shuffled)

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of step 1, 2, ...; pairs of like length share one, to pad little."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        start = position * self.pairs_per_step
        picked = [self.examples[i] for i in self._order(epoch)[start : start + self.pairs_per_step]]
        return by_length(picked, self.config.batch_size)

    def epoch(self, step: int) -> float:
        """Return how many epochs are done after `step`."""
        return step / self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the rate of step 1, 2, ...: a linear rise over the warm-up, then the decay, never 0 in the run."""
        peak = self.config.learning_rate
        assert peak is not None  # filled in by TrainConfig.resolved
        warmup = math.ceil(self.config.warmup_ratio * self.steps)
        if step <= warmup:
            return peak * step / warmup
        left = (self.steps - step + 1) / (self.steps - max(warmup, 1) + 1)
        if self.config.lr_scheduler_type == "linear":
            return peak * left
        if self.config.lr_scheduler_type == "cosine":
            return peak * (1 - math.cos(math.pi * left)) / 2
        return peak

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, epoch]).permutation(len(self.examples))


def by_length(examples: Sequence[Example], size: int) -> list[Batch]:
    """Group examples of like length into batches of `size`."""
    ordered = sorted(examples, key=lambda e: len(e.prompt) + max(map(len, e.responses)), reverse=True)
    return [Batch.of(ordered[i : i + size]) for i in range(0, len(ordered), size)]
