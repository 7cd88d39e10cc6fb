"""Log-probs of given responses, for lists of prompts with several responses each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.base.halving import Halving
from lite_dil.base.signs import CHOSEN
from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import plan_responses
from lite_dil.data.encoder import Example

Ids = Sequence[int]


def token_logps(
    backend: Backend,
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    say: Callable[[str], None],
    row_tokens: int = 4096,
) -> list[list[np.ndarray]]:
    """Return the log-probs of all response tokens in nats, under the active adapter.

    They come from a pass like training's: a sampler's own log-probs differ by rounding, which a log-ratio of the two would
    mistake for a difference between the models.

    Args:
        responses: for each prompt its responses, token ids with their end token; a prompt is computed once for all of them
            if the layout shares prompts.
        say: tells the user if memory holds less than a pass.
        row_tokens: maximum tokens of a pass.

    Returns:
        For each prompt and response, an array (tokens,), float32.
    """
    return _scored(backend.token_logps, backend.layout, prompts, responses, say, row_tokens)


def token_hits(
    backend: Backend,
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    say: Callable[[str], None],
    row_tokens: int = 4096,
) -> list[list[np.ndarray]]:
    """Return `token_logps`, and with each whether that token is the most likely one, 1 or 0: (tokens, 2) for each response."""
    return _scored(backend.token_hits, backend.layout, prompts, responses, say, row_tokens)


def compared_logps(
    backend: Backend,
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    say: Callable[[str], None],
    row_tokens: int = 4096,
) -> list[list[np.ndarray]]:
    """Return `token_logps` of the active adapter and of the reference, (tokens, 2) for each prompt and response.

    Both come from passes of the same shape, so that an untrained policy's log-ratio is exactly 0.
    """

    def both(batch: Batch) -> np.ndarray:
        with backend.adapter_off():
            reference = backend.token_logps(batch)
        return np.stack([backend.token_logps(batch), reference], -1)

    return _scored(both, backend.layout, prompts, responses, say, row_tokens)


def _scored(
    work: Callable[[Batch], np.ndarray],
    layout: str,
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    say: Callable[[str], None],
    row_tokens: int,
) -> list[list[np.ndarray]]:
    """Return for each prompt and response the values that `work` computes for the tokens of a batch."""
    wanted = [
        Example(tuple(prompt), tuple(map(tuple, several)), (CHOSEN,) * len(several))
        for prompt, several in zip(prompts, responses, strict=True)
    ]
    halving = Halving("a pass without gradients", lambda batch: batch.tokens, Batch.split, say)
    found: dict[tuple[int, int], np.ndarray] = {}
    for batch, numbers in plan_responses(wanted, layout, sum(map(len, responses)), row_tokens):
        values = np.concatenate(halving.run(work, batch))
        parts = np.split(values, np.cumsum([len(response) for response in batch.responses])[:-1])
        found.update(zip(numbers, parts, strict=True))
    return [[found[at, i] for i in range(len(several))] for at, several in enumerate(responses)]


def log_ratio(backend: Backend, prompt: Ids, response: Ids) -> float:
    """Return the log-ratio of a response, policy to reference, in nats per token."""

    def logps() -> np.ndarray:
        return token_logps(backend, [prompt], [[response]], lambda _: None)[0][0]

    policy = logps()
    with backend.adapter_off():
        reference = logps()
    return float(np.mean(policy - reference, dtype=np.float64))
