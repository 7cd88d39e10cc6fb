"""Generation on torch: the batch and its left padding, and draws from exactly the model's own distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from lite_dil.backends import Answer


def generate(
    base: Any,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seeds: Sequence[int] | None,
) -> list[Answer]:
    """Continue the prompts in one batch of a transformers model; see `lite_dil.backends.Backend.generate`."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[end_ids[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with _plain_settings(base):
        out = base.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,  # `Draws` leaves one token to choose from
            use_cache=True,  # an empty GenerationConfig need not say so
            logits_processor=None if seeds is None else [Draws(seeds)],
            eos_token_id=list(end_ids),
            pad_token_id=end_ids[0],
        )
    return [Answer.of(row, end_ids) for row in out[:, longest:].tolist()]


class Draws(LogitsProcessor):
    """Draws each row's next token from the softmax of its logits, by one number of the row's own a token.

    The numbers come from numpy: torch's random state, which dropout draws from, is not touched.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.rows = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores`, (rows, vocabulary), as 0 for the token drawn and minus infinity for all others."""
        numbers = torch.tensor([[row.random()] for row in self.rows], dtype=torch.float64)
        return torch.full_like(scores, -torch.inf).scatter(-1, pick(scores, numbers.to(scores.device)), 0.0)


def pick(logits: Tensor, numbers: Tensor) -> Tensor:
    """Return the token of each row, (rows, 1), at which the sum of the probabilities passes its number from [0, 1).

    In float64: float32 would make one step of several of a large vocabulary's rare tokens, all but one never drawn.
    """
    sums = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)


@contextmanager
def _plain_settings(base: Any) -> Iterator[None]:
    """Keep out what the checkpoint's generation_config.json sets: a repetition penalty, say, would bend greedy search too.

    An argument of `generate` only overrules the settings that it names.
    """
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
