"""Sample several responses to each prompt, with their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import Generated
from lite_dil.generation.batch_generator import ROWS, BatchGenerator, Request, batched
from lite_dil.generation.scoring import Ids, compared_logps


@dataclass(frozen=True)
class Rollout:
    """A sampled response.

    Attributes:
        ids: its tokens, with the end token last unless it reached the limit first.
        logps: the log-prob of each token, (tokens,), float32, in nats.
        reference_logps: the same under the reference.
        ended: whether it has its end token.
    """

    ids: tuple[int, ...]
    logps: np.ndarray
    reference_logps: np.ndarray
    ended: bool


def rollouts(
    backend: Backend,
    prompts: Sequence[Ids],
    seeds: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    say: Callable[[str], None],
    row_tokens: int = 4096,
    draw: Callable[[Sequence[Request]], list[Generated]] | None = None,
) -> list[list[Rollout]]:
    """Sample responses from the active adapter's exact distribution; score them, and the reference, as training does.

    Args:
        seeds: for each prompt, one seed per response.
        max_new_tokens: maximum tokens of a response including its end token; at least 1.
        end_ids: the tokens that end a response.
        say: tells the user if memory holds less than a batch or a pass.
        row_tokens: maximum tokens of a scoring pass; a generation batch has `ROWS` times as many.
        draw: draws a batch in the backend's place, from the same distribution.

    Returns:
        For each prompt, its responses in the order of their seeds.
    """
    rows = [
        [Request(tuple(prompt), max_new_tokens, seed) for seed in several]
        for prompt, several in zip(prompts, seeds, strict=True)
    ]
    draw = draw or BatchGenerator(backend, end_ids, say).draw
    found = dict[Request, Generated]()  # equal rows have equal responses
    for batch in batched(list(chain.from_iterable(rows)), ROWS * row_tokens):
        found.update(zip(batch, draw(batch), strict=True))
    answers = [[found[each] for each in several] for several in rows]
    ids = [[answer.whole for answer in several] for several in answers]
    logps = compared_logps(backend, prompts, ids, say, row_tokens)
    return [
        [Rollout(one, both[:, 0], both[:, 1], answer.end is not None) for one, both, answer in zip(*columns, strict=True)]
        for columns in zip(ids, logps, answers, strict=True)
    ]
