"""The reference's log-probs of all examples, computed before training in batches larger than a step's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from lite_dil.batching.batch import Batch
from lite_dil.batching.options import ScheduleOptions
from lite_dil.batching.schedule import PRECOMPUTE_ROWS, plan, row_tokens
from lite_dil.data.encoder import Example
from lite_dil.training.passes import Passes

TOGETHER = 8192  # examples that are in memory at once; the longest of them go together


def missing(passes: Passes, parts: Sequence[Sequence[Example]]) -> Iterator[Example]:
    """Yield the examples whose log-probs the cache does not know."""
    return (example for example in itertools.chain(*parts) if passes.cache.lookup(Batch.of([example])) is None)


def precompute(passes: Passes, parts: Sequence[Sequence[Example]], sizes: ScheduleOptions) -> Iterator[int]:
    """Fill the cache, and yield after each batch how many examples were computed so far; what was yielded is kept."""
    left, done = missing(passes, parts), 0
    while some := list(itertools.islice(left, TOGETHER)):
        for batch in plan(some, passes.backend.layout, len(some), PRECOMPUTE_ROWS * row_tokens(sizes)):
            passes.reference(batch)
            yield (done := done + batch.examples)
