"""Held-out rows that are also training rows: figures on them measure memorisation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lite_dil.data.dataset import DataSet


class Overlap(NamedTuple):
    """The overlap of held-out data with training data, token for token and before cutting.

    Of `of` held-out rows, `rows` have the prompt and the responses of a training row, whichever response is preferred there;
    `prompts`, which includes them, have a training row's prompt.
    """

    of: int
    rows: int
    prompts: int

    def __str__(self) -> str:
        """Return what is shared; empty if no prompt is."""
        parts, of = [], f"of {self.of:,} held-out rows"
        if self.rows:
            are = "is a training row" if self.rows == 1 else "are training rows"
            parts.append(f"{self.rows:,} {of} {are} too (the same prompt and responses)")
        if others := self.prompts - self.rows:
            have = "has" if others == 1 else "have"
            parts.append(
                f"{others:,} {'more' if parts else of} {have} the prompt of a training row, but not all its responses"
            )
        return ", ".join(parts)

    @property
    def warning(self) -> str:
        """What is shared and how it affects the held-out figures; empty if no prompt is shared."""
        little = "nothing" if self.prompts == self.of else "less"
        return f"{self}: the held-out figures say {little} about new prompts" if self.prompts else ""


def overlap(training: DataSet, held_out: DataSet) -> Overlap:
    """Count the held-out rows that an epoch of the training data also has, by their 64-bit hashes."""
    prompts, rows = (_among(held_out.names[:, i], training.names[:, i]) for i in range(2))
    return Overlap(len(held_out.examples), rows, prompts)


def _among(names: np.ndarray, known: np.ndarray) -> int:
    """Return how many of `names` are in `known`; sorting it takes 8 bytes per row."""
    known = np.sort(known)
    return int((np.searchsorted(known, names, "right") > np.searchsorted(known, names, "left")).sum())
