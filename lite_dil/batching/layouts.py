"""Layouts: a ragged batch as arrays for a forward pass. They give the same results at different cost.

*plain* repeats each prompt before each of its responses and pads. *packed* puts many prompts in one row, each followed by its
responses. *prefix* holds prompts in one block and responses in another. Pure numpy, shared by the backends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lite_dil.batching.batch import Batch


@dataclass(frozen=True)
class Layout:
    """What every layout says about the response tokens.

    Attributes:
        hidden_index: (tokens,) int64, for each response token the flat index of the hidden state that predicts it (for the
            first token of a response, the state of the last prompt token).
        own_index: (tokens,), the flat index of each response token's own hidden state.
        targets: (tokens,) int64, the response tokens themselves.
        token_index: (responses, longest) int64, the indices of each response's tokens; 0 where `token_mask` is 0.
        token_mask: (responses, longest) float32, 1 on tokens, 0 after a response's end.
    """

    hidden_index: np.ndarray
    own_index: np.ndarray
    targets: np.ndarray
    token_index: np.ndarray
    token_mask: np.ndarray

    @property
    def end_index(self) -> np.ndarray:
        """Index of each response's last token, (responses,) int64."""
        return self.token_index.max(-1)


@dataclass(frozen=True)
class Plain(Layout):
    """One row per response; hidden states are numbered row * columns + column.

    Attributes:
        input_ids: (responses, columns) int64, padded on the right. Attention is causal, so no token sees a pad.
    """

    input_ids: np.ndarray


@dataclass(frozen=True)
class Segment:
    """A prompt and its responses in a packed row: the prompt at start .. start + prompt, then each response in turn."""

    start: int
    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Packed(Layout):
    """One row with all tokens; hidden states are numbered by their place in it.

    A response token attends causally to its own response and to its whole prompt; its position continues from the prompt.

    Attributes:
        input_ids: (1, tokens of the row) int64.
        position_ids: (1, tokens of the row) int64.
        segments: the places of each prompt and its responses.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Prefix(Layout):
    """Prompts (B, P), padded on the left, and responses (n, R), padded on the right.

    Hidden states are numbered row * R + column in an (n, R) block: the state that predicts token `column` of response `row`.
    The state of a response's last token, which predicts nothing, is included only on request (`own`); otherwise `own_index`
    is empty. Positions count the pads: prompts end at P - 1 and responses start at P, which only relative positions (rope)
    allow.

    Attributes:
        prompt_ids: (B, P) int64.
        prompt_mask: (B, P) bool, true on tokens.
        response_ids: (n, R) int64.
        owner: (n,) int64, the prompt of each response.
        states: (n,) int64, how many hidden states of each row are used.
    """

    prompt_ids: np.ndarray
    prompt_mask: np.ndarray
    response_ids: np.ndarray
    owner: np.ndarray
    states: np.ndarray


def plain(batch: Batch, pad_id: int = 0, multiple: int = 1) -> Plain:
    """Return a batch with one row per response, its prompt repeated before it. The oracle for the other layouts.

    Args:
        pad_id: the padding id; it does not affect any result.
        multiple: rows are padded to a multiple of this many tokens.
    """
    prompts = [batch.prompts[i] for i in batch.prompt_of]
    lengths, starts = _lengths(batch.responses), _lengths(prompts)
    columns = _rounded(int((starts + lengths).max()), multiple)
    input_ids = np.full((len(prompts), columns), pad_id, np.int64)
    for row, (prompt, response) in enumerate(zip(prompts, batch.responses, strict=True)):
        input_ids[row, : len(prompt) + len(response)] = np.concatenate([prompt, response])
    token_index, token_mask, column = _tokens(lengths)
    hidden = (np.arange(len(prompts))[:, None] * columns + (starts - 1)[:, None] + column)[token_mask]
    targets = np.concatenate(batch.responses)
    return Plain(hidden, hidden + 1, targets, token_index, token_mask.astype(np.float32), input_ids)


def packed(batch: Batch, pad_id: int = 0, multiple: int = 1) -> Packed:
    """Return a batch as one row: each prompt once, followed by its responses.

    Args:
        pad_id: the padding id at the row's end; it does not affect any result.
        multiple: the row is padded to a multiple of this many tokens.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    hidden: list[np.ndarray] = [np.empty(0, np.int64)] * len(batch.responses)
    states = list(hidden)
    at = 0
    for number, prompt in enumerate(batch.prompts):
        own = np.flatnonzero(batch.prompt_of == number)
        lengths = tuple(len(batch.responses[i]) for i in own)
        segments.append(Segment(at, len(prompt), lengths))
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        last, at = at + len(prompt) - 1, at + len(prompt)
        for i, length in zip(own, lengths, strict=True):
            states[i] = np.arange(at, at + length)
            hidden[i] = np.concatenate([[last], states[i][:-1]])
            ids.append(batch.responses[i])
            positions.append(np.arange(len(prompt), len(prompt) + length))
            at += length
    pad = _rounded(at, multiple) - at
    ids.append(np.full(pad, pad_id, np.int64))
    positions.append(np.zeros(pad, np.int64))
    token_index, token_mask, _ = _tokens(_lengths(batch.responses))
    return Packed(
        np.concatenate(hidden),
        np.concatenate(states),
        np.concatenate(batch.responses),
        token_index,
        token_mask.astype(np.float32),
        np.concatenate(ids)[None],
        np.concatenate(positions)[None],
        tuple(segments),
    )


def prefix(batch: Batch, pad_id: int = 0, multiple: int = 1, own: bool = False) -> Prefix:
    """Return a batch with its prompts in one block and its responses in another.

    Args:
        pad_id: the padding id; it does not affect any result.
        multiple: both blocks are padded to a multiple of this many tokens.
        own: whether to include every response token's own hidden state, also that of the last token.
    """
    starts, lengths = _lengths(batch.prompts), _lengths(batch.responses)
    states = lengths + own
    columns, width = _rounded(int(starts.max()), multiple), _rounded(int(states.max()), multiple)
    prompt_ids = np.full((len(starts), columns), pad_id, np.int64)
    for row, prompt in enumerate(batch.prompts):
        prompt_ids[row, columns - len(prompt) :] = prompt
    response_ids = np.full((len(lengths), width), pad_id, np.int64)
    for row, response in enumerate(batch.responses):
        response_ids[row, : len(response)] = response
    token_index, token_mask, column = _tokens(lengths)
    hidden = (np.arange(len(lengths))[:, None] * width + column)[token_mask]
    return Prefix(
        hidden,
        hidden + 1 if own else np.empty(0, np.int64),
        np.concatenate(batch.responses),
        token_index,
        token_mask.astype(np.float32),
        prompt_ids,
        np.arange(columns) >= columns - starts[:, None],
        response_ids,
        batch.prompt_of,
        states,
    )


def _lengths(arrays: list[np.ndarray]) -> np.ndarray:
    return np.array([len(array) for array in arrays])


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _tokens(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return token_index and token_mask (bool) for responses of these lengths, and the column of each token."""
    column = np.arange(lengths.max())
    mask = column < lengths[:, None]
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.where(mask, first[:, None] + column, 0), mask, column
