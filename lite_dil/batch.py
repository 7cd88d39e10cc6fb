"""A batch is ragged and free of any layout; lite_dil.layouts turns it into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lite_dil.examples import CHOSEN, Example


@dataclass(frozen=True)
class Batch:
    """Prompts, and responses that name their prompt.

    prompts=[p0, p1], responses=[w0, l0, w1, l1], prompt_of=[0, 0, 1, 1], signs=[1, -1, 1, -1] are two pairs.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    prompt_of: np.ndarray
    signs: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        """Collect examples, their responses in order."""
        return cls(
            prompts=[np.array(example.prompt, np.int64) for example in examples],
            responses=[np.array(response, np.int64) for example in examples for response in example.responses],
            prompt_of=np.array([i for i, example in enumerate(examples) for _ in example.responses], np.int64),
            signs=np.array([sign for example in examples for sign in example.signs], np.int64),
        )

    @property
    def chosen(self) -> np.ndarray:
        """Indices of the chosen responses, pair by pair."""
        return np.flatnonzero(self.signs == CHOSEN)

    @property
    def rejected(self) -> np.ndarray:
        """Indices of the rejected responses, pair by pair."""
        return np.flatnonzero(self.signs != CHOSEN)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, float32."""
        return np.array([len(response) for response in self.responses], np.float32)

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len(self.chosen)

    @property
    def shared_tokens(self) -> int:
        """Tokens that must be computed where a prompt is computed once: prompts and responses, without padding."""
        return sum(map(len, self.prompts)) + sum(map(len, self.responses))

    @property
    def tokens(self) -> int:
        """Tokens of all the sequences, each response counted with its prompt, without padding."""
        return sum(len(response) + len(self.prompts[p]) for response, p in zip(self.responses, self.prompt_of, strict=True))
