"""The learning rate of each step."""

from __future__ import annotations

import math

from lite_dil.batching.options import ResolvedSchedule


def learning_rate(options: ResolvedSchedule, steps: int, step: int) -> float:
    """Return the rate of step 1, 2, ... of `steps`: a linear warm-up, then the decay; never 0 within the run."""
    peak, warmup = options.learning_rate, math.ceil(options.warmup_ratio * steps)
    if step <= warmup:
        return peak * step / warmup
    left = (steps - step + 1) / (steps - max(warmup, 1) + 1)
    if options.lr_scheduler_type == "linear":
        return peak * left
    if options.lr_scheduler_type == "cosine":
        return peak * (1 - math.cos(math.pi * left)) / 2
    return peak
