"""Compute the reference's log-probs of all examples before training, in batches larger than a step's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from lite_dil.batching.batch import Batch
from lite_dil.batching.options import ScheduleOptions
from lite_dil.batching.schedule import PRECOMPUTE_ROWS, plan, row_tokens
from lite_dil.data.encoder import Example
from lite_dil.training.passes import Passes

TOGETHER = 8192  # examples in memory at once, which are batched by length


def missing(passes: Passes, parts: Sequence[Sequence[Example]]) -> Iterator[Example]:
    """Yield the examples whose log-probs are not cached."""
    return (example for example in itertools.chain(*parts) if passes.cache.lookup(Batch.of([example])) is None)


def precompute(passes: Passes, parts: Sequence[Sequence[Example]], sizes: ScheduleOptions) -> Iterator[int]:
    """Fill the cache; yield after each batch how many examples are computed and saved so far."""
    left, done = missing(passes, parts), 0
    while some := list(itertools.islice(left, TOGETHER)):
        for batch in plan(some, passes.backend.layout, len(some), PRECOMPUTE_ROWS * row_tokens(sizes)):
            passes.reference(batch)
            yield (done := done + batch.examples)
