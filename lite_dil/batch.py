"""A batch is ragged and free of any layout; a layout turns it into numpy arrays that every backend can use."""

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
    def tokens(self) -> int:
        """Tokens of all the sequences, each response counted with its prompt, without padding."""
        return sum(len(response) + len(self.prompts[p]) for response, p in zip(self.responses, self.prompt_of, strict=True))


@dataclass(frozen=True)
class Layout:
    """What a forward pass needs, as arrays.

    Attributes:
        input_ids: (rows, columns) int64, padded on the right. Attention is causal, so that a pad is seen by no token.
        hidden_index: (tokens,) int64, for each response token the flat index row * columns + column of the hidden state
            that predicts it (for the first token of each response, that of the last prompt token).
        targets: (tokens,) int64, the response tokens themselves.
        token_index: (responses, longest) int64, which of the `tokens` each response is made of; 0 where `token_mask` is 0.
        token_mask: (responses, longest) float32, 1 on tokens, 0 behind a response's end.
    """

    input_ids: np.ndarray
    hidden_index: np.ndarray
    targets: np.ndarray
    token_index: np.ndarray
    token_mask: np.ndarray


def plain(batch: Batch, pad_id: int = 0, multiple: int = 1) -> Layout:
    """Lay a batch out with a row a response, its prompt repeated before it. The oracle for every other layout.

    Args:
        pad_id: the id that fills rows up; it has no influence on any result.
        multiple: rows are padded to a multiple of this many tokens.
    """
    prompts = [batch.prompts[i] for i in batch.prompt_of]
    lengths = np.array([len(response) for response in batch.responses])
    starts = np.array([len(prompt) for prompt in prompts])
    columns = -(-int((starts + lengths).max()) // multiple) * multiple

    input_ids = np.full((len(prompts), columns), pad_id, np.int64)
    for row, (prompt, response) in enumerate(zip(prompts, batch.responses, strict=True)):
        input_ids[row, : len(prompt) + len(response)] = np.concatenate([prompt, response])

    column = np.arange(lengths.max())
    token_mask = column < lengths[:, None]
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    hidden = np.arange(len(prompts))[:, None] * columns + (starts - 1)[:, None] + column
    return Layout(
        input_ids=input_ids,
        hidden_index=hidden[token_mask],
        targets=np.concatenate(batch.responses),
        token_index=np.where(token_mask, first[:, None] + column, 0),
        token_mask=token_mask.astype(np.float32),
    )
