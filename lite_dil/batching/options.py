"""Options that decide the examples and the learning rate of a step."""

from __future__ import annotations

from dataclasses import dataclass

from lite_dil.base.option import FREE, option
from lite_dil.data.options import Lengths, SampleOptions
from lite_dil.data.sources import EMBEDDED
from lite_dil.models.options import Seeded
from lite_dil.objectives.options import per_loss

# The embedded pairs are few and easy: at the general rates one epoch changes the responses only halfway (docs/LOG.md).
EMBEDDED_RATE = 2e-4


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Lengths, Seeded):
    """The examples of a step, how they are split into passes, and the learning rate."""

    learning_rate: float | None = option(
        "optimisation",
        None,
        f"peak learning rate (default: {per_loss('learning_rate')}; with --data {EMBEDDED} {EMBEDDED_RATE:g})",
    )
    lr_scheduler_type: str = option(
        "optimisation", "linear", "decay after the warm-up", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = option("optimisation", 0.1, "share of the steps in which the rate rises from 0")
    batch_size: int = option(
        "optimisation",
        2,
        "pairs (or single responses) in one forward and backward pass; --row-tokens may split it, with the same result",
    )
    gradient_accumulation_steps: int = option(
        "optimisation", 2, "passes per optimiser step; any split of the same examples gives the same step"
    )
    epochs: float = option("optimisation", 1.0, "passes over the data")
    max_steps: int | None = option("optimisation", None, "stop after this many optimiser steps instead of after --epochs")
    row_tokens: int | None = option(
        "engine",
        None,
        "maximum tokens in one pass, padding included: further pairs of a batch go into another pass, with the same result. "
        "Less saves memory, more is faster on a large GPU (default: twice --max-length, enough for the longest pair)",
        kind=FREE,
    )


@dataclass(frozen=True, kw_only=True)
class ResolvedSchedule(ScheduleOptions):
    """Schedule options with the learning rate resolved."""

    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class DrawOptions(ResolvedSchedule, SampleOptions, Lengths, Seeded):
    """Options that decide which responses are drawn for a data set, and in which batches."""
