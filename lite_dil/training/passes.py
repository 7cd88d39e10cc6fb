"""Passes without gradients, in pieces that memory holds, with a cache of the reference's log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import never
from lite_dil.base.disk import DiskFailed
from lite_dil.base.halving import Halving
from lite_dil.batching.batch import Batch
from lite_dil.objectives.losses import log_ratio
from lite_dil.training.reference_cache import ReferenceCache


class Passes:
    """Computes log-probs without gradients, in passes that memory holds; the reference's are cached."""

    def __init__(self, backend: Backend, reduction: str, cache: ReferenceCache, say: Callable[[str], None]) -> None:
        self.backend, self.reduction, self.cache, self.say = backend, reduction, cache, say
        self._halving = Halving("a pass without gradients", lambda batch: batch.tokens, Batch.halves, say)

    def run(self, work: Callable[[Batch], np.ndarray], batch: Batch) -> np.ndarray:
        """Return the result of `work` for the batch, an array whose first axis follows the responses."""
        return np.concatenate(self._halving.run(work, batch))

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Return the policy's summed log-probs, (responses,)."""
        return self.run(self.backend.sequence_logps, batch)

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return the policy's log-probs of all response tokens, (tokens,)."""
        return self.run(self.backend.token_logps, batch)

    def reference(self, batch: Batch) -> np.ndarray:
        """Return the reference's summed log-probs, (responses,), from the cache or computed and cached."""
        known = self.cache.lookup(batch)
        if known is None:
            with self.backend.adapter_off():
                known = self.sequence_logps(batch)
            self.remember(batch, known)
        return known

    def remember(self, batch: Batch, logps: np.ndarray) -> None:
        """Cache the reference's summed log-probs of a batch: on disk, or only in memory once the disk fails."""
        with self._or_in_memory():
            self.cache.add(batch, logps)

    def sync(self) -> None:
        """Wait until the cache is on the disk."""
        with self._or_in_memory():
            self.cache.sync()

    @contextmanager
    def _or_in_memory(self) -> Iterator[None]:
        try:
            yield
        except DiskFailed as error:
            self.say(f"{error}. Continuing: the reference's log-probs are kept in memory from here on")

    def baseline(self, batches: Sequence[Batch], stop: Callable[[], bool] = never) -> float:
        """Return kto's reference point z0: the mean log-ratio of responses to other prompts, or 0 if negative (eq. 8).

        Without batches, as for every other objective, it is 0. `stop` is called between passes; if it ends the work early,
        the value is meaningless.
        """
        found = []
        for batch in batches:
            if stop():
                break
            found.append(log_ratio(self.sequence_logps(batch), self.reference(batch), batch.lengths, self.reduction))
        return max(0.0, float(np.concatenate(found).mean())) if found else 0.0
