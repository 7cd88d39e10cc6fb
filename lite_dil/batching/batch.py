"""A batch: ragged and independent of layout; lite_dil.batching.layouts turns it into arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lite_dil.base.signs import CHOSEN
from lite_dil.data.encoder import Example


@dataclass(frozen=True)
class Batch:
    """Prompts, and responses with the index of their prompt.

    prompts=[p0, p1], responses=[w0, l0, w1, l1], prompt_of=[0, 0, 1, 1], signs=[1, -1, 1, -1] are two pairs. Unpaired
    responses are prompts with one response. `places` says where each prompt's example came from, `margins` are its margin.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    prompt_of: np.ndarray
    signs: np.ndarray
    places: tuple[str, ...] = ()
    margins: tuple[float, ...] = ()

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        """Make a batch of examples, with their responses in order."""
        return cls(
            prompts=[np.array(example.prompt, np.int64) for example in examples],
            responses=[np.array(response, np.int64) for example in examples for response in example.responses],
            prompt_of=np.array([i for i, example in enumerate(examples) for _ in example.responses], np.int64),
            signs=np.array([sign for example in examples for sign in example.signs], np.int64),
            places=tuple(example.place for example in examples),
            margins=tuple(example.margin for example in examples),
        )

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum values of the response tokens, (tokens,), over each response: (responses,)."""
        return np.add.reduceat(values, np.cumsum([0, *self.lengths[:-1]]).astype(np.int64))

    def halves(self) -> tuple[Batch, ...]:
        """Return the two halves of its examples, or nothing if it has only one; for batches made by `of`."""
        middle = (self.examples + 1) // 2
        if middle == self.examples:
            return ()
        at = int(np.searchsorted(self.prompt_of, middle))
        return tuple(
            Batch(
                self.prompts[prompts],
                self.responses[responses],
                self.prompt_of[responses] - prompts.start,
                self.signs[responses],
                self.places[prompts],
                self.margins[prompts],
            )
            for prompts, responses in (
                (slice(0, middle), slice(0, at)),
                (slice(middle, self.examples), slice(at, len(self.responses))),
            )
        )

    def split(self) -> tuple[Batch, ...]:
        """Return `halves` or, of a single example, those of its responses; nothing if it has only one."""
        middle = math.ceil(len(self.responses) / 2)
        if self.examples > 1 or middle == len(self.responses):
            return self.halves()
        return tuple(
            Batch(self.prompts, self.responses[some], self.prompt_of[some], self.signs[some], self.places)
            for some in (slice(0, middle), slice(middle, None))
        )

    @property
    def chosen(self) -> np.ndarray:
        """Indices of the chosen responses."""
        return np.flatnonzero(self.signs == CHOSEN)

    @property
    def rejected(self) -> np.ndarray:
        """Indices of the rejected responses."""
        return np.flatnonzero(self.signs != CHOSEN)

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the chosen and of the rejected response of every pair (two responses to one prompt)."""
        same = self.prompt_of[self.chosen][:, None] == self.prompt_of[self.rejected]
        first, second = np.nonzero(same)
        return self.chosen[first], self.rejected[second]

    @property
    def pair_margins(self) -> np.ndarray:
        """The margin of every pair, in the order of `pairs`, float32."""
        first, _ = self.pairs
        return np.array([self.margins[prompt] if self.margins else 0.0 for prompt in self.prompt_of[first]], np.float32)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each response, float32."""
        return np.array([len(response) for response in self.responses], np.float32)

    @property
    def answer_lengths(self) -> list[list[int]]:
        """For each prompt, the number of tokens of each of its responses."""
        found: list[list[int]] = [[] for _ in self.prompts]
        for prompt, response in zip(self.prompt_of, self.responses, strict=True):
            found[prompt].append(len(response))
        return found

    @property
    def examples(self) -> int:
        """Number of examples: prompts with their responses."""
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences, each response counted with its prompt, without padding."""
        return sum(len(response) + len(self.prompts[p]) for response, p in zip(self.responses, self.prompt_of, strict=True))


def by_batch(values: np.ndarray, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Split a step's values, (responses,) over all batches, into those of each batch."""
    return np.split(values, np.cumsum([len(batch.responses) for batch in batches[:-1]], dtype=np.int64))
